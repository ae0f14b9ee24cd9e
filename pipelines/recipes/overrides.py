"""Reads recipes: by name or from a YAML file, with `--set a.b=value`, each error naming the nearest field."""

from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from pipelines.workflow import UsageError, nearest


def apply_overrides(tree: dict[str, Any], assignments: list[str]) -> dict[str, Any]:
    """A copy of a recipe's tree with `a.b=value` assignments applied; list items are addressed by their number.

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
            node = _child(node, part, ".".join(parents[: depth + 1]))
        _child(node, leaf, path)
        node[int(leaf) if isinstance(node, list) else leaf] = yaml.safe_load(text)
    return result


def explain(error: Exception, model: type[BaseModel]) -> str:
    """A validation error as one line: where, what, and the nearest known field for a typo."""
    if not isinstance(error, ValidationError):
        return str(error).splitlines()[0]
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        known = _fields_at(model, first["loc"][:-1])
        return f"unknown field {place!r}{nearest(str(first['loc'][-1]), known)}"
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


def _fields_at(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    current: Any = model
    for part in location:
        if isinstance(part, int):
            continue
        annotation = current.model_fields[part].annotation
        nested = [item for item in (annotation, *getattr(annotation, "__args__", ())) if _is_model(item)]
        if not nested:
            return []
        current = nested[0]
    return list(current.model_fields)


def _is_model(item: Any) -> bool:
    return isinstance(item, type) and issubclass(item, BaseModel)
