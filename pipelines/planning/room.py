"""Room on local disks for what is about to be written, asked before anything starts.

Folders of several URLs may lie on one disk, which then needs room for them together; an object store has room. A folder
need not exist yet: its disk is that of the nearest folder above it.
"""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from fsspec.implementations.local import LocalFileSystem

from components.runtime.storage.connection import StoreError, connect


def check_room(needed: Mapping[str, int], *, purpose: str) -> None:
    """Raise StoreError, in a line, if a disk lacks room. Object stores have no such limit.
    `needed`: URL of a folder, which need not exist yet -> bytes that will be written below it. Folders on one disk need
    the sum. `purpose`: subject of the message, such as "the checkpoints"."""
    disks: dict[int, list[tuple[Path, str, int]]] = {}
    for url, count in needed.items():
        if is_local(url) and count:
            path = Path(connect(url)[1])
            folder = next(folder for folder in (path, *path.parents) if folder.exists())
            disks.setdefault(os.stat(folder).st_dev, []).append((folder, url, count))
    for places in disks.values():
        total, free = sum(count for _, _, count in places), shutil.disk_usage(places[0][0]).free
        if total > free:
            needed_bytes, urls = readable_bytes(total), " and ".join(url for _, url, _ in places)
            remedy = (
                "make room (`cascade gc`), or name another place (--storage or --out; TMPDIR for a temporary folder)"
            )
            raise StoreError(
                f"{purpose} need {needed_bytes} in {urls}, where {readable_bytes(free)} are free; {remedy}"
            )


def is_local(url: str) -> bool:
    """True for a folder on a disk of the calling machine, mounted folders included."""
    return isinstance(connect(url)[0], LocalFileSystem)


def readable_bytes(count: float) -> str:
    """1234567 -> "1.2 MB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.{0 if unit == 'B' else 1}f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
