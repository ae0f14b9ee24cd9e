"""Listings of a URL's files, each with the mark of its version, and the errors of this room.
Every error is a clear line: the value, its place, and the remedy."""

import os
import re
from collections.abc import Callable
from typing import NamedTuple

import fsspec

from components.runtime.storage.connection import at, connect, files_below, reason, retried

ADDRESS = re.compile(r" <[^<>]* at 0x[0-9a-fA-F]+>| at 0x[0-9a-fA-F]+")  # of the object in Pillow's words


class SourceError(ValueError):
    """A user's source can't be used (missing, empty, without classes). Nothing has been written."""


class ShardError(RuntimeError):
    """A shard differs from the index (truncated, changed, with refused members); names the shard."""


class TokensError(ValueError):
    """Tokens do not fit their use: another codebook, another grid, other images."""


class DataError(RuntimeError):
    """The images are not fit for use: more of them are corrupt than the setting allows."""


def reason_of(error: Exception) -> str:
    """The reason why an image can't be drawn, for the index: without addresses, equal in every process."""
    return f"{type(error).__name__}: {ADDRESS.sub('', str(error))[:120]}"


MARKS = ("ETag", "etag", "md5Hash", "mtime", "LastModified", "created", "blob_id")  # the first is the mark


class FileVersion(NamedTuple):
    """A file in a listing, in its present version."""

    path: str  # relative to the listed URL
    bytes: int
    mark: str


def list_versions(url: str) -> list[FileVersion]:
    """Files below `url`, sorted by path. Raises SourceError if there are none, or the listing fails."""
    filesystem, root = connect(url)
    try:
        infos = retried(lambda: files_below(filesystem, root), url)
    except Exception as error:  # each file system has its own errors
        raise SourceError(
            f"{url} can't be listed ({reason(error)}); check the address, the bucket and the rights"
        ) from error
    if not infos:
        raise SourceError(f"nothing at {url}: the path is missing or empty; check it for typing errors")
    for name, info in infos.items():
        if info.get("islink"):  # of a local disk; its listing follows no link to a folder
            if not os.path.isfile(name):
                kind = "a folder, which is not followed" if os.path.isdir(name) else "nothing"
                raise SourceError(f"{name} is a link to {kind}; put a copy in its place, or take it away")
            info["mtime"] = os.stat(name).st_mtime
    skip = len(root.rstrip("/")) + 1
    return sorted(
        FileVersion(name[skip:] or name.rpartition("/")[2], int(info.get("size") or 0), _mark(info))
        for name, info in infos.items()
    )


def first_file(url: str, is_wanted: Callable[[str], bool] = bool) -> FileVersion | None:
    """The first file at or below `url`, any or one with a path that `is_wanted`, by its absolute URL.
    The path is relative to `url`. Looks folder by folder, without listing all. None if there is no such file, or if
    folders can't be listed."""

    def look(filesystem: fsspec.AbstractFileSystem, root: str) -> FileVersion | None:
        root, below = root.rstrip("/"), ""
        if not filesystem.isfile(root):
            folders = ((folder.rstrip("/")[len(root) :], names) for folder, _, names in filesystem.walk(root))
            paths = (f"{folder}/{name}" for folder, names in folders for name in sorted(names))
            if not (below := next((path for path in paths if is_wanted(path.removeprefix("/"))), "")):
                return None
        info = filesystem.info(root + below)
        return FileVersion(url.rstrip("/") + below, int(info.get("size") or 0), _mark(info))

    return at(url, look)


def _mark(info: dict[str, object]) -> str:
    return next((str(info[name]) for name in MARKS if info.get(name) is not None), "")
