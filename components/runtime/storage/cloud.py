"""What one vendor's object store needs beyond fsspec's interface: the one form in which `connection` knows them."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import fsspec


def _nothing(filesystem: fsspec.AbstractFileSystem) -> None:
    return None


def _itself(error: Exception) -> Exception:
    return error


class Cloud(NamedTuple):
    """A kind of object store. Its write-once put is fsspec's `mode="create"`, which must be a conditional write."""

    remedy: str  # what to do where nobody can sign in
    options: Mapping[str, Any] = MappingProxyType({})  # of its file system; a user's FSSPEC_… go before them
    filesystem: str | None = None  # its class, where it is not the one that fsspec would take
    extra: str | None = None  # of this package, which brings the file system; None: it is always there
    loggers: tuple[str, ...] = ()  # that say, some with a traceback, what is tried again or raised anyway
    prepare: Callable[[fsspec.AbstractFileSystem], None] = _nothing  # bounds what its client repeats; may come again
    plain: Callable[[Exception], Exception] = _itself  # an error in Python's own terms where there is one
