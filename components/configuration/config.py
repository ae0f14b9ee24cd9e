"""Base class of all configurations: frozen, complete, and closed to unknown fields."""

from dataclasses import dataclass
from typing import Any, ClassVar, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    SerializationInfo,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
)

from components.configuration.leaves import assign

IDENTITY = "identity"  # context of the dump that enters a stage's key: without what changes no result


@dataclass(frozen=True)
class Since:
    """Marks a field younger than published keys, left out of a key at the value `before`.

    At `before` the field means the behavior of the time without the field.

    `eta: Annotated[float, Since(0.0)] = 0.0` moves no key of any recipe; another value does, and another default too.
    """

    before: Any


@dataclass(frozen=True)
class Unkeyed:
    """Marks a field without effect on results; the field never enters a key."""


class Config(BaseModel):
    """A frozen pydantic model that refuses unknown fields, so that a typo never passes silently.

    Its parts are configurations too. Where a part is one of several kinds, its field `kind` says which, and each kind
    has only its own fields.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    # Part of a stage's key: raised when the same numbers give another result.
    stage_version: ClassVar[int] = 1
    # The same of a part, as of one kind of network: joins the part's fields in the key.
    revision: ClassVar[dict[str, str]] = {}

    _markers: ClassVar[dict[str, Since | Unkeyed]] = {}  # markers of own and inherited fields

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        inherited = {n: m for base in reversed(cls.__mro__[1:]) for n, m in getattr(base, "_markers", {}).items()}
        fields = cls.model_fields.items()
        own = {n: m for n, field in fields for m in field.metadata if isinstance(m, Since | Unkeyed)}
        cls._markers = inherited | own

    @model_serializer(mode="wrap")
    def _dump(self, dump: SerializerFunctionWrapHandler, info: SerializationInfo) -> dict[str, Any]:
        values = dump(self)
        if info.context != IDENTITY:
            return values
        for name, marker in self._markers.items():
            if isinstance(marker, Unkeyed) or getattr(self, name) == marker.before:
                values.pop(name, None)
        return values | self.revision

    @classmethod
    def of(cls, **values: Any) -> Self:
        """Builds the configuration from named values, wherever the names stand: `total_steps=100`.

        Names are those of `assign`.

        Raises ValueError for a name that is not there or stands in several places.
        """
        return cls.model_validate(assign(cls, {}, values))

    def replace(self, **values: Any) -> Self:
        """A copy with new values, named as in `of`, and validated again."""
        return self.model_validate(assign(type(self), self.model_dump(), values))


def first_fault(error: ValidationError) -> str:
    """Place and message of the first fault of a validation error, in a single line."""
    first = error.errors()[0]
    parts = [str(part) if str(part).isprintable() else repr(part) for part in first["loc"]]
    place, message = ".".join(parts), first["msg"].removeprefix("Value error, ")
    return f"{place}: {message}" if place else message
