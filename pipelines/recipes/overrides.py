"""Reads recipes: by name or from a YAML file, with `--set a.b=value`, each error naming the nearest field."""

from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from pipelines.workflow import UsageError, nearest


class Part(dict[str, Any]):
    """A part that was not there: which fields it may have, the recipe's validation says."""


def apply_overrides(tree: dict[str, Any], assignments: list[str]) -> dict[str, Any]:
    """A copy of a recipe's tree with `a.b=value` assignments applied; list items are addressed by their number, and a
    part that the recipe left out (`null`) comes into being by its first field.

    Raises UsageError for a malformed assignment or a field that does not exist.
    """
    result = yaml.safe_load(yaml.safe_dump(tree))
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals:
            raise UsageError(f"--set {assignment!r}: write it as field.name=value")
        node: Any = result
        *parents, leaf = path.strip().split(".")
        for depth, part in enumerate(parents):
            node = _parent(node, part, ".".join(parents[: depth + 1]))
        if not isinstance(node, Part):
            _child(node, leaf, path)
        node[int(leaf) if isinstance(node, list) else leaf] = yaml.safe_load(text)
    return result


def explain(error: Exception, model: type[BaseModel]) -> str:
    """A validation error as one line: where, what, and the nearest known field for a typo."""
    if not isinstance(error, ValidationError):
        return str(error).splitlines()[0]
    first = error.errors()[0]
    path, choices = _walk(model, first["loc"])
    place = ".".join(path)
    if first["type"] == "extra_forbidden":
        known = [field for choice in choices for field in choice.model_fields]
        return f"unknown field {place!r}{nearest(path[-1], known)}"
    message = first["msg"].removeprefix("Value error, ")
    return f"{place}: {message} (got {first['input']!r:.80})" if place else message


def _child(node: Any, part: str, path: str) -> Any:
    if isinstance(node, list):
        if not part.isdigit() or int(part) >= len(node):
            raise UsageError(f"--set {path}: item {part!r} of {len(node)}; they count from 0")
        return node[int(part)]
    if not isinstance(node, dict):
        raise UsageError(f"--set {path}: {part!r} is below a plain value")
    if part not in node:
        raise UsageError(f"--set {path}: unknown field {part!r}{nearest(part, node)}")
    return node[part]


def _parent(node: Any, part: str, path: str) -> Any:
    child = _child(node, part, path)
    if child is None:
        child = node[int(part) if isinstance(node, list) else part] = Part()
    return child


def _walk(model: type[BaseModel], location: tuple[int | str, ...]) -> tuple[list[str], list[type[BaseModel]]]:
    """The place as `--set` writes it, and the models whose field is its last part.

    pydantic puts the tag of a union (the `network` of a prior) into the location, as if it were a field.
    """
    path: list[str] = []
    owners, choices = [model], [model]
    for part in location:
        tagged = [choice for choice in choices if part in _tags(choice)]
        if tagged:
            choices = tagged
            continue
        path.append(str(part))
        if not isinstance(part, int):
            owners, choices = choices, [found for choice in choices for found in _models_in(choice, part)]
    return path, owners


def _tags(model: type[BaseModel]) -> tuple[Any, ...]:
    field = model.model_fields.get("network")
    return get_args(field.annotation) if field is not None else ()


def _models_in(model: type[BaseModel], name: str) -> list[type[BaseModel]]:
    """The models that a field may hold."""
    annotation = model.model_fields[name].annotation if name in model.model_fields else None
    candidates = (annotation, *get_args(annotation))
    return [item for item in candidates if isinstance(item, type) and issubclass(item, BaseModel)]
