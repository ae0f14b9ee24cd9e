"""Errors of a single line for the user: UsageError, the nearest name to a typo, validation errors."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from components.configuration.config import fits, parts_of

Model = TypeVar("Model", bound=BaseModel)
MOST_NAMES = 40  # names that an error message lists


class UsageError(Exception):
    """An invalid request of the user, described in a single line. Exit code 2."""


@contextmanager
def usage_errors(place: str = "") -> Iterator[None]:
    """Inside, a ValueError becomes a UsageError; `place` stands in front of the message."""
    try:
        yield
    except ValueError as error:
        raise UsageError(f"{place}{error}") from error


def nearest(name: str, names: Iterable[str]) -> str:
    """`; did you mean x?`, or the first 40 names if none is near."""
    choices = list(names)
    for close in get_close_matches(name, choices, n=1, cutoff=0.5):
        return f"; did you mean {close!r}?"
    return f"; there are {', '.join(choices[:MOST_NAMES])}{', …' if len(choices) > MOST_NAMES else ''}"


def validated(model: type[Model], fields: Mapping[str, Any], place: str = "") -> Model:
    """Validates the fields of a model. Raises UsageError for the first fault, with `place` in front of it."""
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        raise UsageError(f"{place}{explain(error, model)}") from error


def explain(error: Exception, model: type[BaseModel]) -> str:
    """Describes a validation error in a line: place, fault, and the nearest field to a typo."""
    if not isinstance(error, ValidationError):
        return str(error).splitlines()[0]
    faults = error.errors()  # of a part of several kinds: each kind's
    first = next((fault for fault in faults if fault["type"] != "extra_forbidden"), faults[0])
    path, choices = _walk(model, first["loc"])
    place = ".".join(path)
    if first["type"] == "extra_forbidden":
        return f"unknown field {place!r}{nearest(path[-1], [name for each in choices for name in each.model_fields])}"
    message = first["msg"].removeprefix("Value error, ")
    shown = "" if isinstance(first["input"], Mapping) else f" (got {first['input']!r:.80})"
    return f"{place}: {message}{shown}" if place else message


def _walk(model: type[BaseModel], location: tuple[int | str, ...]) -> tuple[list[str], list[type[BaseModel]]]:
    """Location as written for `--set`, without tags of unions, and models with a field of the last name."""
    path: list[str] = []
    owners, choices = [model], [model]
    for part in location:
        if tagged := [choice for choice in choices if len(choices) > 1 and _has_tag(choice, part)]:
            choices = tagged
            continue
        path.append(str(part))
        if not isinstance(part, int):
            owners, choices = choices, [inner for choice in choices for inner in _models_in(choice, part)]
    return path, owners


def _has_tag(model: type[BaseModel], tag: int | str) -> bool:
    """True if the tag is a model's kind, the network's kind, or the model's name."""
    models = [model, *parts_of(model, "network")]
    return model.__name__ == tag or any("kind" in m.model_fields and fits(m, {"kind": tag}) for m in models)


def _models_in(model: type[BaseModel], name: str) -> list[type[BaseModel]]:
    annotation = model.model_fields[name].annotation if name in model.model_fields else None
    items = [item for item in get_args(annotation) if isinstance(item, type) and issubclass(item, BaseModel)]
    return parts_of(model, name) or items


def check_figures(path: Path | None) -> None:
    """Raise UsageError for a --json file out of reach for writing."""
    if path is None:
        return
    if not path.absolute().parent.is_dir():
        raise UsageError(f"--json {path}: there is no such folder; make it first")
    if path.is_dir():
        raise UsageError(f"--json {path} is a folder: name a file in it")
    new = not path.exists()
    try:
        if new or path.is_file():  # to open a pipe is to wait for its reader
            path.open("ab").close()
    except OSError as error:
        raise UsageError(f"--json {path} can't be written ({error.strerror}); name another file") from None
    if new:
        path.unlink()
