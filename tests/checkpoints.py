"""Checkpoints that a test writes and reads in its own process, where a training writes them behind its steps."""

from pathlib import Path
from typing import Any

from torch import Tensor

from components.runtime.storage.store import Store
from components.training.checkpoint import copy_to_host, read_checkpoint, refuse_non_finite, write_host_copy
from components.training.parallel import ALONE, Worker
from components.training.run_folder import checkpoint_name, fetch_once, last_checkpoint
from components.training.sharding import whole


def write_checkpoint(folder: Path, state: dict[str, Any], *, step: int, worker: Worker = ALONE) -> None:
    """Write the rank's part of `state` after `step` steps, into a folder that ranks may share.
    Raises NonFiniteError, writing nothing, if a weight is not finite."""
    refuse_non_finite(state["weights"], step=step, worker=worker)
    if worker.rank >= worker.parts:
        return
    own = folder.with_name(f"{folder.name}-of-rank-{worker.rank}")
    write_host_copy(own, copy_to_host(state, step=step, worker=worker))
    folder.mkdir(parents=True, exist_ok=True)
    for file in own.iterdir():
        file.replace(folder / file.name)
    own.rmdir()


def read_folder(folder: Path) -> tuple[int, dict[str, Any]]:
    """(step, state) of a checkpoint in a local folder, without a look at the digests."""
    return read_checkpoint(lambda file: folder / file)


def weights_in(folder: Path) -> dict[str, Tensor]:
    """The weights of a checkpoint in a local folder, whole."""
    return {name: whole(tensor) for name, tensor in read_folder(folder)[1]["weights"].items()}


def read_run(run: Store, name: str, place: Path) -> tuple[int, dict[str, Any]]:
    """(step, state) of a checkpoint in a run folder, fetched to `place` and verified."""
    return read_checkpoint(lambda file: fetch_once(run, name, file, place=place))


def last_weights(run: Store, place: Path, *, step: int) -> dict[str, Tensor]:
    """The weights of a run's last checkpoint, which is that of `step`, with those of the EMA."""
    name = checkpoint_name(step)
    assert last_checkpoint(run) == (name, step)
    return {name: whole(tensor) for name, tensor in read_run(run, name, place)[1]["weights"].items()}
