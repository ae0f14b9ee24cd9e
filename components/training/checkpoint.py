"""Checkpoints: copies of a state in the host's memory, written whole and never non-finite.
On disk: weights as safetensors, the rest as a `weights_only` state, and digests of both."""

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._pytree import tree_map_only

from components.runtime.storage.store import digest_of
from components.training.optim import NonFiniteError
from components.training.parallel import ALONE, Worker, gathered, local

WEIGHTS = "weights.safetensors"
STATE = "state.pt"
POSITION = "position.json"  # {"step": ...}: readable without torch
DIGESTS = "digests.json"  # of every other file: name -> [bytes, sha256]


class HostCopy(NamedTuple):
    """The whole state of a training after `step` steps, in the host's memory."""

    step: int
    state: dict[str, Any]
    generators: dict[str, Any]


def copy_to_host(state: dict[str, Any], *, step: int, worker: Worker = ALONE) -> HostCopy:
    """Copy a task's state after `step` steps; training may go on after the return.
    Called by all ranks where networks are in shards: rank 0 gets whole tensors, the other ranks no state.
    `state["weights"]` maps flat names to tensors; the rest holds plain values and optimizer states. The data position
    is the step itself: the stream is a function of (seed, step). Training draws nothing from the global generators but
    dropout, which is seeded at each step; the generators are copied all the same."""
    whole = on_host(state, gathers=worker.shards, copies=worker.rank == 0 or not worker.shards)
    return HostCopy(step, whole or {}, generator_states())


def write_host_copy(folder: Path, copy: HostCopy) -> None:
    """Write a checkpoint of finite weights, with digests. The folder appears whole or not at all.
    Called behind training: leaves Python's lock free during writes and digests."""
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in copy.state["weights"].items()}, part / WEIGHTS)
    rest = {name: value for name, value in copy.state.items() if name != "weights"}
    torch.save({"task": rest, "generators": copy.generators}, part / STATE)
    (part / POSITION).write_text(json.dumps({"step": copy.step}))
    (part / DIGESTS).write_text(json.dumps({path.name: digest_of(path) for path in sorted(part.iterdir())}))
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(part, folder)


def read_checkpoint(folder: Path) -> tuple[int, dict[str, Any]]:
    """Reads (step, state), and restores the global generators. No code in the files is run.
    Tensors are read from the disk where they are used, so a rank that takes a shard of each needs no memory for all."""
    step = json.loads((folder / POSITION).read_text())["step"]
    state = torch.load(folder / STATE, map_location="cpu", weights_only=True, mmap=True)
    restore_generators(state["generators"])
    return step, {"weights": load_file(folder / WEIGHTS), **state["task"]}


def refuse_non_finite(weights: dict[str, Tensor], *, step: int, worker: Worker = ALONE) -> None:
    """Raises NonFiniteError naming the first tensor with NaN or infinity. Waits for the device once.
    Called by all ranks where networks are in shards; then all raise for a tensor that is not finite on any rank."""
    checks = {name: local(tensor).isfinite().all() for name, tensor in weights.items() if tensor.is_floating_point()}
    finite = torch.stack([*checks.values()]).int() if checks else torch.ones(1)
    if worker.shards:
        dist.all_reduce(finite, op=dist.ReduceOp.MIN)
    if bool(finite.all()):
        return
    name = next(name for name, good in zip(checks, finite.tolist(), strict=True) if not good)
    raise NonFiniteError(
        f"{name} is not finite at step {step}, so no checkpoint was written; try a lower learning_rate, a "
        "smaller max_grad_norm or precision: fp32 (the last good checkpoint is kept)"
    )


def generator_states() -> dict[str, Any]:
    """States of the global generators of torch (CPU and devices), numpy and Python, for `weights_only`."""
    state = np.random.get_state()
    assert isinstance(state, tuple)  # legacy=False would return a dictionary
    kind, keys, *numbers = state
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), *numbers],
        "python": random.getstate(),
    }


def restore_generators(states: dict[str, Any]) -> None:
    """Set the global generators; those of devices only where there are as many devices as before."""
    torch.set_rng_state(states["torch"])
    if len(states["cuda"]) == torch.cuda.device_count() > 0:
        torch.cuda.set_rng_state_all(states["cuda"])
    kind, keys, *numbers = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *numbers))
    random.setstate(states["python"])


def on_host(state: Any, *, gathers: bool = False, copies: bool = True) -> Any:
    """Copies a task's state to the host's memory; of tensors in shards, the calling rank's shard.
    A state is dictionaries and lists of tensors and plain values. From a GPU all tensors go at once into pinned memory,
    which torch reuses for the next copy, with a single wait.

    Args:
        gathers: tensors in shards are gathered whole. Called by all ranks, which gather one tensor at a time: no device
            holds more than one whole.
        copies: False for a rank that only takes part; the result is then None.
    """

    def copied(tensor: Tensor) -> Tensor | None:
        part = (gathered if gathers else local)(tensor.detach())
        if not copies:
            return None
        if part.device.type != "cuda":
            return part.to("cpu", copy=True)
        return torch.empty_like(part, device="cpu", pin_memory=True).copy_(part, non_blocking=True)

    copy = tree_map_only(Tensor, copied, state)
    if torch.cuda.is_initialized():
        torch.cuda.current_stream().synchronize()
    return copy if copies else None
