"""A checkpoint on the disk of a node, fetched once for all the ranks that work there."""

import os
import secrets
import shutil
import tempfile
from pathlib import Path
from typing import Any

from filelock import FileLock

from components.runtime.storage.store import SCRATCH, DamagedFileError, Store
from components.training.checkpoint import read_checkpoint
from components.training.parallel import Worker, any_rank, lowest
from components.training.run_folder import fetch_checkpoint

TOKEN_BITS = 62
REFUSED = "refused.txt"  # why the rank that fetched found the checkpoint damaged


def read_on_node(run: Store, name: str, worker: Worker) -> tuple[int, dict[str, Any]]:
    """(step, state) of a checkpoint, on every rank; no copy of it stays on the node.

    Called by every rank. Raises DamagedFileError on all of them where any of them finds it damaged.
    """
    place, found, why = place_on_node(worker), None, ""
    try:
        found = read_checkpoint(fetch_once(run, name, place))
    except DamagedFileError as error:
        why = str(error)
    damaged = any_rank(found is None, worker)  # all have read it now
    shutil.rmtree(place, ignore_errors=True)
    if damaged or found is None:
        raise DamagedFileError(why or "another worker can't read it")
    return found


def place_on_node(worker: Worker) -> Path:
    """A folder of a name that all ranks know and that no start before this one had: nothing old is ever found there."""
    token = lowest(secrets.randbits(TOKEN_BITS) if worker.rank == 0 else 2**TOKEN_BITS, worker)
    return Path(tempfile.gettempdir()) / f"{SCRATCH}restore-{token:016x}"


def fetch_once(run: Store, name: str, place: Path) -> Path:
    """The folder of a checkpoint in `place`, which whoever comes first fetches; the others wait for it.

    Raises DamagedFileError, also in those that only waited.
    """
    place.mkdir(mode=0o700, exist_ok=True)
    whole, refused = place / name, place / REFUSED
    with FileLock(place / "lock"):
        if refused.exists():
            raise DamagedFileError(refused.read_text())
        if not whole.exists():
            fetch_whole(run, name, whole, refused)
    return whole


def fetch_whole(run: Store, name: str, whole: Path, refused: Path) -> None:
    part = whole.with_name(f"{name}.part")
    try:
        os.replace(fetch_checkpoint(run, name, part), whole)
    except BaseException as error:
        shutil.rmtree(part, ignore_errors=True)
        if isinstance(error, DamagedFileError):
            refused.write_text(str(error))
        raise
