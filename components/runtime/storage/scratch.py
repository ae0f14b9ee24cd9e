"""Scratch folders on one node's disk, removed at the end, also after a kill.

A process that is killed removes nothing, and what it leaves is as large as a checkpoint. So a process that works in a
scratch folder holds a lock file beside it, which the operating system lets go when the process dies; whoever makes the
next scratch folder on the node removes those that nobody holds.
"""

import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock

SCRATCH = "cascade-on-node-"  # prefix of the folders, invisible to other nodes


@contextmanager
def scratch_folder(purpose: str) -> Iterator[Path]:
    """A new private folder in the node's temporary folder, TMPDIR. `purpose`: a word of its name.
    Its name says that it is of this node: `pool.portable` refuses to hand it to workers."""
    remove_abandoned()
    with held_folder(Path(tempfile.gettempdir()) / f"{SCRATCH}{purpose}-{uuid.uuid4().hex[:12]}") as folder:
        yield folder


@contextmanager
def held_folder(folder: Path) -> Iterator[Path]:
    """Hold a folder, made where there is none, and remove the folder at the end. Several processes may."""
    lock = Path(f"{folder}.{os.getpid()}.lock")
    with FileLock(lock):  # before there is a folder: one without a holder is abandoned
        folder.mkdir(mode=0o700, exist_ok=True)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            lock.unlink(missing_ok=True)


def remove_abandoned() -> None:
    """Remove the scratch folders of killed processes from the node's temporary folder."""
    for lock in Path(tempfile.gettempdir()).glob(f"{SCRATCH}*.lock"):
        folder = lock.with_suffix("").with_suffix("")
        with suppress(OSError), FileLock(lock, timeout=0):  # raised: another user's, or its process lives
            lock.unlink(missing_ok=True)
            if not any(lock.parent.glob(f"{folder.name}.*.lock")):
                shutil.rmtree(folder, ignore_errors=True)
