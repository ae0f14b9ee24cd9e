"""What lies at a URL, with the mark that tells two versions of a file apart."""

from collections.abc import Callable
from typing import NamedTuple

import fsspec

from components.data.errors import SourceError
from components.runtime.storage.connection import connect, files_below, reason

MARKS = ("ETag", "etag", "md5Hash", "mtime", "LastModified", "created", "blob_id")  # the first that is known


class FileVersion(NamedTuple):
    path: str  # relative to the listed URL
    bytes: int
    mark: str


def list_versions(url: str) -> list[FileVersion]:
    """Files below `url`, sorted by path. Raises SourceError if there is nothing, or if it can't be listed."""
    filesystem, root = connect(url)
    try:
        found = files_below(filesystem, root)
    except Exception as error:  # each file system has its own errors for a missing bucket or wrong credentials
        raise SourceError(
            f"{url} can't be listed ({reason(error)}); check the address, the bucket and the rights"
        ) from error
    if not found:
        raise SourceError(f"nothing at {url}: the path is missing or empty; check it for typing errors")
    skip = len(root.rstrip("/")) + 1
    return sorted(
        FileVersion(name[skip:] or name.rpartition("/")[2], int(info.get("size") or 0), _mark(info))
        for name, info in found.items()
    )


def first_file(url: str, is_wanted: Callable[[str], bool]) -> FileVersion | None:
    """A file at or below `url` whose path, relative to it, is wanted; found folder by folder, without listing all.

    Its path is absolute. None if there is none, or if folders can't be listed: `list_versions` says why.
    """
    filesystem, root = connect(url)
    root = root.rstrip("/")
    if filesystem.isfile(root):
        return _version(filesystem, root, url)
    for folder, _, names in filesystem.walk(root):
        below = folder.rstrip("/")[len(root) + 1 :]
        paths = [f"{below}/{name}" if below else name for name in sorted(names)]
        if wanted := next(filter(is_wanted, paths), None):
            return _version(filesystem, f"{root}/{wanted}", f"{url.rstrip('/')}/{wanted}")
    return None


def _version(filesystem: fsspec.AbstractFileSystem, path: str, url: str) -> FileVersion:
    info = filesystem.info(path)
    return FileVersion(url, int(info.get("size") or 0), _mark(info))


def _mark(info: dict[str, object]) -> str:
    return next((str(info[name]) for name in MARKS if info.get(name) is not None), "")
