"""Room on local disks for what is about to be written, asked before anything starts.

Folders of several URLs may lie on one disk, which then needs room for them together; an object store has room. A folder
need not exist yet: its disk is that of the nearest folder above it.
"""

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from fsspec.implementations.local import LocalFileSystem
from rich import filesize

from components.runtime.storage.connection import StoreError, connect
from components.runtime.storage.store import Store


class Space(NamedTuple):
    """Room for checkpoints, in bytes."""

    storage: int = 0  # what checkpoints add to storage, and models in the end
    temporary: int = 0  # the same in one node's temporary folder, at most
    trainings: tuple[str, ...] = ()

    def check(self, *, root: Store | None, works: bool) -> None:
        """Raise StoreError, in one line, for too little room on this machine; an object store has room.
        `root`: storage; None: it is not asked. `works`: whether trainings may write checkpoints on this node."""
        places = {} if root is None else {root.uri: self.storage}
        places |= {tempfile.gettempdir(): self.temporary} if works else {}
        check_room(places, purpose=f"the checkpoints of {', '.join(self.trainings)}")


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
            needed_bytes, urls = filesize.decimal(total), " and ".join(url for _, url, _ in places)
            remedy = (
                "make room (`cascade gc`), or name another place (--storage or --out; TMPDIR for a temporary folder)"
            )
            raise StoreError(
                f"{purpose} need {needed_bytes} in {urls}, where {filesize.decimal(free)} are free; {remedy}"
            )


def is_local(url: str) -> bool:
    """True for a folder on a disk of the calling machine, mounted folders included."""
    return isinstance(connect(url)[0], LocalFileSystem)
