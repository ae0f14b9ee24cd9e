"""`--set a.b=value` on a recipe's tree, each error naming the nearest field."""

import copy
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from components.configuration.leaves import KIND, PlaceError, find, fits, kind_of, members, parts_of, put
from pipelines.workflow import UsageError, nearest


def apply_overrides(tree: dict[str, Any], assignments: list[str], shape: type[BaseModel]) -> dict[str, Any]:
    """A copy of a recipe's tree with `a.b=value` assignments applied.

    Items of lists are addressed by their number. A name may be short where only one part below has it
    (`base.total_steps`), a kind stands in the place of its part (`base.network=dit`, or `base.network.kind=dit`), and a
    part that the recipe left out (`null`) is created when one of its fields is set.

    Raises UsageError for a malformed assignment, or a field that does not exist or stands in several places.
    """
    result = copy.deepcopy(tree)
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals:
            raise UsageError(f"--set {assignment!r}: write it as field.name=value")
        try:
            set_value(result, shape, path.strip(), yaml.safe_load(text))
        except PlaceError as error:
            raise UsageError(f"--set {path}: {error}{hint(error, path, result, shape)}") from None
    return result


def set_value(tree: dict[str, Any], shape: type[BaseModel], path: str, value: Any) -> None:
    """Set one value of a tree. Raises PlaceError."""
    first, _, rest = path.partition(".")
    *parents, leaf = find(shape, tree, first)
    for parent in parents:  # of a part that is named short
        tree.setdefault(parent, {})
        shape, tree = members(shape, tree, parent)[0], tree[parent]
    if not rest or (rest == KIND and parts_of(shape, leaf)):
        put(tree, shape, (leaf,), value)
    elif isinstance(tree.get(leaf), list):
        set_item(tree, shape, leaf, rest, value)
    elif parts := members(shape, tree, leaf):
        chosen = rest.removesuffix(f".{KIND}")
        part = next((other for other in parts_of(shape, leaf) if value in kinds_of(other, chosen)), parts[0])
        kind = {} if kind_of(part) is None else {KIND: kind_of(part)}
        tree[leaf] = kind | {name: own for name, own in (tree.get(leaf) or {}).items() if name in part.model_fields}
        set_value(tree[leaf], part, rest, value)
    else:
        raise PlaceError(f"{leaf!r} is a plain value: it has no {rest!r}")


def kinds_of(model: type[BaseModel], name: str) -> list[str | None]:
    """The kinds that a part of a model may have."""
    return [kind_of(part) for part in parts_of(model, name)]


def set_item(tree: dict[str, Any], shape: type[BaseModel], name: str, path: str, value: Any) -> None:
    """Set a value of an item of a list, or the item. Raises PlaceError."""
    number, _, rest = path.partition(".")
    items = list(tree[name])
    if not number.isdigit() or int(number) >= len(items):
        raise PlaceError(f"item {number!r} of {len(items)}; they count from 0")
    place = int(number)
    model = get_args(shape.model_fields[name].annotation)[0]
    if not rest:
        items[place] = value
    elif isinstance(model, type) and issubclass(model, BaseModel):
        items[place] = dict(items[place])
        set_value(items[place], model, rest, value)
    else:
        raise PlaceError(f"item {number} is a plain value: it has no {rest!r}")
    tree[name] = items


def hint(error: PlaceError, path: str, tree: dict[str, Any], shape: type[BaseModel]) -> str:
    """Where the name stands among the sampling settings, or the nearest one that there is."""
    if not error.known:
        return ""
    try:
        set_value(copy.deepcopy(tree), shape, f"sampling.{path}", None)
    except PlaceError:
        return nearest(path.rpartition(".")[2], error.known)
    return f"; it is sampling.{path}"


def explain(error: Exception, model: type[BaseModel]) -> str:
    """A validation error as one line: where, what, and the nearest known field for a typo."""
    if not isinstance(error, ValidationError):
        return str(error).splitlines()[0]
    found = error.errors()  # of a part of several kinds: each kind's
    first = next((one for one in found if one["type"] != "extra_forbidden"), found[0])
    path, choices = _walk(model, first["loc"])
    place = ".".join(path)
    if first["type"] == "extra_forbidden":
        known = [field for choice in choices for field in choice.model_fields]
        return f"unknown field {place!r}{nearest(path[-1], known)}"
    message = first["msg"].removeprefix("Value error, ")
    return f"{place}: {message} (got {first['input']!r:.80})" if place else message


def _walk(model: type[BaseModel], location: tuple[int | str, ...]) -> tuple[list[str], list[type[BaseModel]]]:
    """The place as `--set` writes it, and the models whose field is its last part.

    pydantic puts the tag of a union (the kind of a network), or the name of its class, into the location, as if it were
    a field.
    """
    path: list[str] = []
    owners, choices = [model], [model]
    for part in location:
        tagged = [choice for choice in choices if len(choices) > 1 and _has_tag(choice, part)]
        if tagged:
            choices = tagged
            continue
        path.append(str(part))
        if not isinstance(part, int):
            owners = choices
            choices = [found for choice in choices for found in _models_in(choice, part)]
    return path, owners


def _has_tag(model: type[BaseModel], tag: int | str) -> bool:
    """Whether a model is of the kind, or its network is, or it has the name."""
    own = model.__name__ == tag or ("kind" in model.model_fields and fits(model, {"kind": tag}))
    network = parts_of(model, "network")
    return own or any("kind" in part.model_fields and fits(part, {"kind": tag}) for part in network)


def _models_in(model: type[BaseModel], name: str) -> list[type[BaseModel]]:
    """The models that a field may hold, be it in a list."""
    annotation = model.model_fields[name].annotation if name in model.model_fields else None
    items = [item for item in get_args(annotation) if isinstance(item, type) and issubclass(item, BaseModel)]
    return parts_of(model, name) or items
