"""Checkpoints: copies of a state in the host's memory, written whole and never non-finite.

A checkpoint has one part, or one for each rank where networks are in shards (`sharding.py`). A rank writes its own part
and reads what it needs, whatever the number of ranks before; no host sees a state whole. `00002-of-00008.safetensors`
holds the third rank's tensors, of those in shards its rows; the first part holds all others. `state.json` is the state
without tensors. `digests-00002.json`, written last, has size and sha256 of the part's files. Nothing is a pickle."""

import json
import os
import random
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils._pytree import tree_map_only

from components.runtime.storage.store import DamagedFileError, digest_of
from components.training.optim import NonFiniteError
from components.training.parallel import ALONE, Worker, is_cut, local, shard_rows

STATE = "state.json"  # {"step": …, "parts": …, "task": …, "generators": …}; a tensor is {"tensor": its name, …}
IN_WEIGHTS = "task/weights/"  # in front of the flat names of weights


def part_file(part: int, parts: int) -> str:
    """Name of a part's tensors."""
    return f"{part:05d}-of-{parts:05d}.safetensors"


def digests_file(file: str) -> str:
    """Name of the list that holds a file's digest: file name -> [bytes, sha256]."""
    return f"digests-{'00000' if file == STATE else file[:5]}.json"


class HostCopy(NamedTuple):
    """A rank's part of the state of a training after some steps, in the host's memory."""

    state: dict[str, Any]  # as in STATE
    tensors: dict[str, Tensor]  # by name; of tensors in shards the rank's rows
    part: int = 0
    parts: int = 1


def copy_to_host(state: dict[str, Any], *, step: int, worker: Worker = ALONE) -> HostCopy:
    """Copy the calling rank's part of a task's state after `step` steps; training may then go on.
    The data position is the step itself: the stream is a function of (seed, step). Training draws nothing from the
    global generators but dropout, which is seeded at each step; they are copied all the same."""
    part, parts = (worker.part, worker.parts) if worker.shards else (0, 1)
    tensors = dict[str, Tensor]()
    plain = separated({"task": state, "generators": generator_states()}, tensors)
    own = {name: tensor for name, tensor in tensors.items() if part == 0 or is_cut(tensor)}
    return HostCopy({"step": step, "parts": parts, **plain}, on_host(own), part, parts)


def separated(value: Any, tensors: dict[str, Tensor], name: str = "") -> Any:
    """The value as JSON; its tensors go into `tensors`, by their paths in the value.
    A dictionary whose keys are numbers becomes {"pairs": …}, a tuple a list."""
    if isinstance(value, Tensor):
        tensors[name] = value
        return {"tensor": name} | ({"rows": len(value)} if is_cut(value) else {})
    if type(value) in (list, tuple):
        return [separated(each, tensors, f"{name}/{number}") for number, each in enumerate(value)]
    if not isinstance(value, dict):
        return value
    named = {key: separated(each, tensors, f"{name}/{key}".strip("/")) for key, each in value.items()}
    return named if all(isinstance(key, str) for key in named) else {"pairs": [*named.items()]}


def joined(value: Any, read: Callable[[dict[str, Any]], Any]) -> Any:
    """The value that `separated` took apart; `read` gives the tensors."""
    if type(value) is list:
        return [joined(each, read) for each in value]
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return read(value)
    pairs = value["pairs"] if "pairs" in value else value.items()
    return {key: joined(each, read) for key, each in pairs}


def write_host_copy(folder: Path, copy: HostCopy) -> None:
    """Write a part of a checkpoint, its digests last; the folder appears whole or not at all.
    Called behind training: leaves Python's lock free during writes."""
    scratch = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    tensors = {name: tensor.contiguous() for name, tensor in copy.tensors.items()}
    save_file(tensors, scratch / part_file(copy.part, copy.parts))
    if copy.part == 0:
        (scratch / STATE).write_text(json.dumps(copy.state))
    digests = {path.name: digest_of(path) for path in sorted(scratch.iterdir())}
    (scratch / digests_file(part_file(copy.part, copy.parts))).write_text(json.dumps(digests))
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(scratch, folder)


class StoredTensor(NamedTuple):
    """A tensor in shards of a checkpoint, read where it is used."""

    name: str
    length: int  # rows
    parts: int
    open: Callable[[int], Any]  # the safetensors file of a part

    def rows(self, first: int, stop: int) -> Tensor:
        """The rows [first, stop). Raises DamagedFileError."""
        pieces = []
        for part in range(self.parts):
            begin, end = shard_rows(self.length, part, self.parts)
            if begin < end and (first < end and begin < stop):
                rows = self.open(part).get_slice(self.name)
                pieces.append(rows[max(first, begin) - begin : min(stop, end) - begin])
        return torch.cat(pieces) if pieces else self.open(0).get_slice(self.name)[:0]


def read_checkpoint(fetch: Callable[[str], Path]) -> tuple[int, dict[str, Any]]:
    """Reads (step, state), and restores the global generators; tensors in shards are `StoredTensor`s.
    `fetch` gives the local file of a name, when it is needed. Tensors are mapped from the disk: a rank that takes a
    part of each needs no memory for all. Raises DamagedFileError for a file that is no part of a checkpoint."""
    try:
        stored = json.loads(fetch(STATE).read_text())
        step, parts = stored.pop("step"), stored.pop("parts")
    except (ValueError, KeyError) as error:
        raise DamagedFileError(f"{STATE} is no state of a training: {error}") from error

    @cache
    def opened(part: int) -> Any:
        path = fetch(part_file(part, parts))
        try:
            return safe_open(path, "pt")
        except SafetensorError as error:  # a pickle, for one
            raise DamagedFileError(f"{path.name} is no safetensors file: {error}") from error

    def read(tensor: dict[str, Any]) -> Tensor | StoredTensor:
        if "rows" in tensor:
            return StoredTensor(tensor["tensor"], tensor["rows"], parts, opened)
        return opened(0).get_tensor(tensor["tensor"])

    state = joined(stored, read)
    restore_generators(state["generators"])
    return step, state["task"]


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
    """States of the global generators of torch (CPU and devices), numpy and Python."""
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
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))


def on_host(state: Any) -> Any:
    """Copies a task's state to the host's memory; of tensors in shards, the calling rank's shard.
    From a GPU all tensors go at once into pinned memory, which torch reuses for the next copy, with a single wait."""

    def copied(tensor: Tensor) -> Tensor:
        part = local(tensor.detach())
        if part.device.type != "cuda":
            return part.to("cpu", copy=True)
        return torch.empty_like(part, device="cpu", pin_memory=True).copy_(part, non_blocking=True)

    copy = tree_map_only(Tensor, copied, state)
    if torch.cuda.is_initialized():
        torch.cuda.current_stream().synchronize()
    return copy
