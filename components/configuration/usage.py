"""Errors of the user, one line each: the error itself, the nearest name to a typo, a validation error explained."""

from collections.abc import Iterable
from difflib import get_close_matches
from typing import get_args

from pydantic import BaseModel, ValidationError

from components.configuration.leaves import fits, parts_of

MOST_NAMES = 40  # in a message


class UsageError(Exception):
    """The user asked for something that can't be; the message is one line. Exit code 2."""


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean x?` or the list of what there is, as far as a line holds."""
    known = list(known)
    close = get_close_matches(name, known, n=1, cutoff=0.5)
    shown = [*known[:MOST_NAMES], *(["…"] if len(known) > MOST_NAMES else [])]
    return f"; did you mean {close[0]!r}?" if close else f"; there are {', '.join(shown)}"


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
