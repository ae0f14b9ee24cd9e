"""Base class of all configurations (frozen, complete, closed), and values by their short names.

`total_steps` is short for `optimization.total_steps`, where only one place below has the name; `network.kind=dit`
chooses as `network=dit` does. Trees are nested dictionaries as `model_dump` gives them; a part that is left out is None
or missing, and is created when one of its fields is set."""

from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import cache, reduce
from itertools import chain
from typing import Any, ClassVar, Self, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    SerializationInfo,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
)

KIND = "kind"
Place = tuple[str, ...]


class PlaceError(ValueError):
    """An unknown name, or a name with several places; `known` holds the valid names."""

    def __init__(self, message: str, known: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.known = known


def assign(model: type[BaseModel], tree: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a model's tree with values set by name. Raises PlaceError.
    Names are those of fields, of parts ("network": a kind, or a mapping of its own fields), of fields of parts where
    only one part has it, or paths as "network.dropout"."""
    result: dict[str, Any] = deepcopy(dict(tree))
    parts = part_names(model)

    def order(name: str) -> int:  # kinds first: they decide which fields there are
        part = name.removesuffix(f".{KIND}").rpartition(".")[2]  # the bottleneck for "network.bottleneck.kind"
        return parts.index(part) if part in parts else len(parts)

    for name in sorted(values, key=order):
        value, place = values[name], find(model, result, name)
        if name in parts and isinstance(value, Mapping):
            present: Mapping[str, Any] = reduce(lambda subtree, part: subtree.get(part) or {}, place, result)
            put(result, model, place, value.get(KIND, present))
            for field in value.keys() - {KIND}:
                put(result, model, (*place, field), value[field])
        else:
            put(result, model, place, value)
    return result


@cache
def part_names(model: type[BaseModel]) -> list[str]:
    """Names of a model's parts, each before the names of inner parts."""
    own = {name: parts for name in model.model_fields if (parts := parts_of(model, name))}
    return [*dict.fromkeys([*own, *(name for parts in own.values() for part in parts for name in part_names(part))])]


@cache
def field_names(model: type[BaseModel]) -> frozenset[str]:
    """Names of a model's fields, and of the fields of all possible parts."""
    inner = (field_names(part) for name in model.model_fields for part in parts_of(model, name))
    return frozenset(model.model_fields).union(*inner)


def put(tree: dict[str, Any], model: type[BaseModel], place: Place, value: Any) -> None:
    """Sets a value in a tree; a kind in the place of a part keeps the fields that both kinds share."""
    *parents, leaf = place[:-1] if place[-1] == KIND and len(place) > 1 else place
    for parent in parents:
        candidates = members(model, tree, parent)
        tree[parent] = tree.get(parent) or started(model, parent, candidates[0])
        model, tree = candidates[0], tree[parent]
    value = value.model_dump() if isinstance(value, BaseModel) else value
    if (kinds := parts_of(model, leaf)) and isinstance(value, str):
        part = next((part for part in kinds if kind_of(part) == value), None)
        if part is None:
            names = tuple(str(kind_of(part)) for part in kinds)
            raise PlaceError(f"unknown kind {value!r}: choose {' or '.join(names)}", names)
        present = tree.get(leaf) or started(model, leaf, kinds[0])
        tree[leaf] = {name: present[name] for name in present if name in part.model_fields} | {KIND: value}
    elif leaf == KIND and tree.get(KIND) not in (None, value):
        raise PlaceError(f"a part of kind {tree[KIND]} stays one: give {value} in the place of the part")
    else:
        tree[leaf] = value


def started(model: type[BaseModel], name: str, part: type[BaseModel]) -> dict[str, Any]:
    """The tree of a new part: the default, or nothing but the kind."""
    default, kind = model.model_fields[name].default, kind_of(part)
    if isinstance(default, BaseModel):
        return default.model_dump()
    return {} if kind is None else {KIND: kind}


def find(model: type[BaseModel], tree: Mapping[str, Any], name: str) -> Place:
    """The place for a name. Raises PlaceError for a name without a place, or with several places."""
    if "." in name or name in model.model_fields:
        return tuple(name.split("."))
    places = [place for place in below(model, tree, name) if place[-1] == name]
    if len(places) == 1:
        return places[0]
    if not places:
        known = tuple(dict.fromkeys(place[-1] for place in below(model, tree)))
        raise PlaceError(f"unknown field {name!r}", known)
    raise PlaceError(f"{name} stands in several places: {' and '.join('.'.join(place) for place in places)}")


def below(model: type[BaseModel], tree: Mapping[str, Any], wanted: str = "") -> Iterator[Place]:
    """All places of a model's tree, as far as the kinds of parts are known; lists are not looked into.
    Parts that can't have a field of the `wanted` name, if one is given, are left out."""
    for name in model.model_fields:
        yield (name,)
        branch = subtree if isinstance(subtree := tree.get(name), Mapping) else {}
        parts = members(model, tree, name)
        inner = (below(part, branch, wanted) for part in parts if not wanted or wanted in field_names(part))
        yield from dict.fromkeys((name, *place) for place in chain.from_iterable(inner) if place[-1] != KIND)


def members(model: type[BaseModel], tree: Mapping[str, Any], name: str) -> list[type[BaseModel]]:
    """Possible models of the part `name`, given the tree; the first kind where the tree has none."""
    subtree, parts = tree.get(name), parts_of(model, name)
    if isinstance(subtree, Mapping) and subtree:
        return [part for part in parts if fits(part, subtree)] or parts
    default = model.model_fields[name].default if name in model.model_fields else None
    return [type(default)] if isinstance(default, BaseModel) else parts[:1]


@cache
def parts_of(model: type[BaseModel], name: str) -> list[type[BaseModel]]:
    """Models that a field may hold; empty for a plain value, and for a list."""
    return _models(model.model_fields[name].annotation) if name in model.model_fields else []


def fits(model: type[BaseModel], tree: Mapping[str, Any]) -> bool:
    """True if a tree has only fields and kinds of the model, inner parts included."""
    field = model.model_fields.get(KIND)
    other = field is not None and KIND in tree and tree[KIND] not in get_args(field.annotation)
    if other or not model.model_fields.keys() >= tree.keys():
        return False
    inner = [(value, parts_of(model, name)) for name, value in tree.items() if isinstance(value, Mapping)]
    return all(any(fits(part, value) for part in parts) for value, parts in inner if parts)


def kind_of(model: type[BaseModel]) -> str | None:
    """The only kind that a model's field `kind` allows; None for a model without kinds."""
    field = model.model_fields.get(KIND)
    return next(iter(get_args(field.annotation)), None) if field is not None else None


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if getattr(annotation, "__origin__", None) in (tuple, list, dict):
        return []
    return [model for item in get_args(annotation) for model in _models(item)]


IDENTITY = "identity"  # context of the dump that enters a stage's key


@dataclass(frozen=True)
class Since:
    """Marks a field younger than published keys, left out of a key at `before`, the value without it.
    `eta: Annotated[float, Since(0.0)] = 0.0` moves no key; another value does, and another default too."""

    before: Any


@dataclass(frozen=True)
class Unkeyed:
    """Marks a field without effect on results; the field never enters a key."""


class Config(BaseModel):
    """A frozen pydantic model that refuses unknown fields, so that a typo never passes silently.
    Of several kinds of a part its field `kind` says which it is, and each kind has only its own fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    stage_version: ClassVar[int] = 1  # in the key: raised when equal numbers give another result
    _markers: ClassVar[dict[str, Since | Unkeyed]] = {}  # markers of own and inherited fields

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        inherited = {n: m for base in reversed(cls.__mro__[1:]) for n, m in getattr(base, "_markers", {}).items()}
        fields = cls.model_fields.items()
        own = {n: m for n, field in fields for m in field.metadata if isinstance(m, Since | Unkeyed)}
        cls._markers = inherited | own

    @property
    def revision(self) -> dict[str, str]:
        """Words that join the fields in a key where equal numbers give another result than before."""
        return {}

    def _check(self) -> None:
        """Raises ValueError for values that do not fit together; calls the base's own where that has one."""

    def model_post_init(self, context: Any) -> None:  # a validator would name itself in errors
        self._check()

    @classmethod
    def before(cls) -> dict[str, Any]:
        """Fields younger than published keys, each with the value of the time without it."""
        return {name: marker.before for name, marker in cls._markers.items() if isinstance(marker, Since)}

    def unchanged(self) -> set[str]:
        """Fields younger than published keys that mean what was done before."""
        return {name for name, before in self.before().items() if getattr(self, name) == before}

    @model_serializer(mode="wrap")
    def _dump(self, dump: SerializerFunctionWrapHandler, info: SerializationInfo) -> dict[str, Any]:
        values = dump(self)
        if info.context != IDENTITY:
            return values
        left_out = {name for name, marker in self._markers.items() if isinstance(marker, Unkeyed)} | self.unchanged()
        return {name: value for name, value in values.items() if name not in left_out} | self.revision

    @classmethod
    def of(cls, **values: Any) -> Self:
        """Builds the configuration from values named as in `assign`: `total_steps=100`. Raises PlaceError."""
        return cls.model_validate(assign(cls, {}, values))

    def replace(self, **values: Any) -> Self:
        """A copy with new values, named as in `of`, and validated again."""
        return self.model_validate(assign(type(self), self.model_dump(), values))


def refuse(fault: object, message: str) -> None:
    """Raises ValueError with the message if there is a fault."""
    if fault:
        raise ValueError(message)


def first_fault(error: ValidationError) -> str:
    """Place and message of the first fault of a validation error, in a single line."""
    first = error.errors()[0]
    parts = [str(part) if str(part).isprintable() else repr(part) for part in first["loc"]]
    place, message = ".".join(parts), first["msg"].removeprefix("Value error, ")
    return f"{place}: {message}" if place else message
