"""A checkpoint on disk: safetensors weights and a `weights_only` state, written whole and never non-finite."""

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from pydantic import TypeAdapter, ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor

from components.configuration.config import first_fault
from components.configuration.file_names import FileName
from components.runtime.storage.store import Digest, digest_of
from components.training.host_copy import gathered_on_host, on_host
from components.training.optim import NonFiniteError
from components.training.parallel import ALONE, Worker, local

WEIGHTS = "weights.safetensors"
STATE = "state.pt"
POSITION = "position.json"  # {"step": ...}: readable without torch
DIGESTS = "digests.json"  # of every other file: name -> [bytes, sha256]


class HostCopy(NamedTuple):
    """A training as it was after `step` steps, whole in the host's memory."""

    step: int
    state: dict[str, Any]
    generators: dict[str, Any]


def copy_to_host(state: dict[str, Any], *, step: int, worker: Worker = ALONE) -> HostCopy:
    """Copy a task's state as it is after `step` steps; training may go on when this returns.

    Called by all ranks where networks are in shards: rank 0 gets whole tensors, the others get no state.

    `state["weights"]` maps flat names to tensors; the rest holds plain values and optimizer states. The data position
    is the step itself: the stream is a function of (seed, step). Training draws nothing from the global generators but
    dropout, which is seeded at each step; they are kept all the same.
    """
    if not worker.shards:
        return HostCopy(step, on_host(state), generator_states())
    return HostCopy(step, gathered_on_host(state, kept=worker.rank == 0) or {}, generator_states())


def write_host_copy(folder: Path, copy: HostCopy) -> None:
    """Write a checkpoint of weights that are finite. The folder appears whole or not at all.

    Called behind training: it computes nothing, and leaves Python's lock free while it writes.
    """
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in copy.state["weights"].items()}, part / WEIGHTS)
    rest = {name: value for name, value in copy.state.items() if name != "weights"}
    torch.save({"task": rest, "generators": copy.generators}, part / STATE)
    (part / POSITION).write_text(json.dumps({"step": copy.step}))
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(part, folder)


def read_checkpoint(folder: Path) -> tuple[int, dict[str, Any]]:
    """(step, state) as they were written; restores the global generators. No code in the files is run.

    Tensors are read from the disk where they are used, so a rank that takes a shard of each needs no memory for all.
    """
    step = json.loads((folder / POSITION).read_text())["step"]
    kept = torch.load(folder / STATE, map_location="cpu", weights_only=True, mmap=True)
    restore_generators(kept["generators"])
    return step, {"weights": load_file(folder / WEIGHTS), **kept["task"]}


def write_digests(folder: Path) -> None:
    """Record size and sha256 of the files in `folder`, which is complete but for this."""
    digests = {path.name: digest_of(path) for path in sorted(folder.iterdir()) if path.is_file()}
    (folder / DIGESTS).write_text(json.dumps(digests))


def read_digests(text: bytes) -> dict[str, Digest]:
    """Name of the file -> what it must be. Raises ValueError for what is no such list."""
    try:
        return TypeAdapter(dict[FileName, Digest]).validate_json(text)
    except ValidationError as error:
        raise ValueError(f"{DIGESTS} is no list of digests: {first_fault(error)}") from None


def refuse_non_finite(weights: dict[str, Tensor], *, step: int, worker: Worker = ALONE) -> None:
    """Raises NonFiniteError naming the first tensor that holds NaN or infinity. A device is waited for once.

    Called by all ranks where networks are in shards; then all raise it that some has found.
    """
    finite = {name: local(tensor).isfinite().all() for name, tensor in weights.items() if tensor.is_floating_point()}
    found = torch.stack([*finite.values()]).int() if finite else torch.ones(1)
    if worker.shards:
        dist.all_reduce(found, op=dist.ReduceOp.MIN)
    if bool(found.all()):
        return
    name = next(name for name, good in zip(finite, found.tolist(), strict=True) if not good)
    raise NonFiniteError(
        f"{name} is not finite at step {step}, so no checkpoint was written; try a lower learning_rate, a "
        "smaller max_grad_norm or precision: fp32 (the last good checkpoint is kept)"
    )


def generator_states() -> dict[str, Any]:
    """The global generators of torch (CPU and devices), numpy and Python, in types that `weights_only` admits."""
    state = np.random.get_state()
    assert isinstance(state, tuple)  # a dictionary is what legacy=False returns
    kind, keys, *numbers = state
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), *numbers],
        "python": random.getstate(),
    }


def restore_generators(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    if len(states["cuda"]) == torch.cuda.device_count() > 0:
        torch.cuda.set_rng_state_all(states["cuda"])
    kind, keys, *numbers = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *numbers))
    random.setstate(states["python"])
