"""Long lists of small models, held as columns of Arrow.

A set of 10⁹ images has up to a million shards, each with an entry in an index and in a manifest. As objects of pydantic
they take 1.5 kB each; as columns the bytes of their values, of which Ray's workers on a node share one copy.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

M = TypeVar("M", bound=BaseModel)
READ_AT_A_TIME = 4096  # values


class ModelTable(Sequence[M]):
    """A list of models as a table with a column for each field."""

    def __init__(self, model: type[M], table: pa.Table) -> None:
        self.model, self.table = model, table

    def __len__(self) -> int:
        return self.table.num_rows

    @overload
    def __getitem__(self, place: int) -> M: ...
    @overload
    def __getitem__(self, place: slice) -> tuple[M, ...]: ...
    def __getitem__(self, place: int | slice) -> M | tuple[M, ...]:
        if isinstance(place, slice):
            return tuple(self[number] for number in range(len(self))[place])
        number = range(len(self))[place]
        (row,) = self.table.slice(number, 1).to_pylist()
        return self.model(**row)

    def __iter__(self) -> Iterator[M]:
        for batch in self.table.to_batches(max_chunksize=READ_AT_A_TIME):
            for row in batch.to_pylist():
                yield self.model(**row)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, ModelTable):
            return self.model == other.model and self.table.equals(other.table)
        return isinstance(other, tuple) and tuple(self) == other  # a part of a list is one

    def __hash__(self) -> int:
        return hash((self.model, len(self)))


class AsTable(NamedTuple):
    """Marks a field `Sequence[model]`: its value is kept as a `ModelTable`, its JSON is that of a list."""

    model: type[BaseModel]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        listed = handler.generate_schema(tuple[self.model, ...])
        read = core_schema.no_info_after_validator_function(self.table, listed)
        given = core_schema.no_info_wrap_validator_function(self.kept, listed)
        written = core_schema.plain_serializer_function_ser_schema(rows)
        return core_schema.json_or_python_schema(read, given, serialization=written)

    def table(self, values: Sequence[BaseModel]) -> ModelTable[BaseModel]:
        """The values as a table."""
        dumped = [value.model_dump() for value in values]
        return ModelTable(self.model, pa.table({n: [row[n] for row in dumped] for n in self.model.model_fields}))

    def kept(self, values: Any, validate: Callable[[Any], Sequence[BaseModel]]) -> ModelTable[BaseModel]:
        """A table as it is, or a table of validated values."""
        return values if isinstance(values, ModelTable) else self.table(validate(values))


def rows(values: Sequence[BaseModel]) -> list[dict[str, Any]]:
    """The values as dictionaries."""
    return values.table.to_pylist() if isinstance(values, ModelTable) else [value.model_dump() for value in values]


def column_of(values: Sequence[BaseModel], name: str) -> np.ndarray:
    """A field of each value, (n,): int64, or objects where the field is text."""
    if isinstance(values, ModelTable) and len(values):
        return values.table[name].to_numpy()
    return np.array([getattr(value, name) for value in values])


def ending(values: Sequence[M], name: str, text: str) -> Iterator[M]:
    """The values whose field `name` ends with `text`, in order."""
    if isinstance(values, ModelTable) and len(values):
        options = pc.MatchSubstringOptions(text)
        found = pc.call_function("ends_with", [values.table[name]], options)
        numbers = pc.call_function("indices_nonzero", [found])
        yield from (values[number] for number in numbers.to_pylist())
        return
    for value in values:
        if getattr(value, name).endswith(text):
            yield value
