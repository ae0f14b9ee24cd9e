"""Whether there is room where files go: disks of local folders; an object store has none that could be asked."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from fsspec.implementations.local import LocalFileSystem

from components.runtime.storage.connection import StoreError, connect


def check_room(needed: Mapping[str, int], *, purpose: str) -> None:
    """Raise StoreError, in one line, if a disk has less free than is needed on it.

    Args:
        needed: URL of a folder, which need not exist yet -> bytes that will be written below it. Folders on one disk
            need the sum; what is no local folder is passed over.
        purpose: what is written, for the message.
    """
    disks: dict[int, list[tuple[Path, str, int]]] = {}
    for url, count in needed.items():
        if (folder := _local_folder(url)) is not None and count:
            disks.setdefault(os.stat(folder).st_dev, []).append((folder, url, count))
    for places in disks.values():
        total, free = sum(count for _, _, count in places), shutil.disk_usage(places[0][0]).free
        if total > free:
            urls = " and ".join(url for _, url, _ in places)
            raise StoreError(
                f"{purpose} need {readable_bytes(total)} in {urls}, where {readable_bytes(free)} are free; make room "
                "(`cascade gc`), or name another place (--storage or --out; TMPDIR for a temporary folder)"
            )


def is_local(url: str) -> bool:
    """Whether it is a folder on a disk of this machine, or one that is mounted here."""
    return isinstance(connect(url)[0], LocalFileSystem)


def _local_folder(url: str) -> Path | None:
    """The folder itself or the nearest one above it that exists; None if the URL is none of this machine's disks."""
    if not is_local(url):
        return None
    path = Path(connect(url)[1])
    return next(folder for folder in (path, *path.parents) if folder.exists())


def readable_bytes(count: float) -> str:
    """1234567 -> "1.2 MB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.{0 if unit == 'B' else 1}f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
