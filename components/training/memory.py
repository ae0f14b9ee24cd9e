"""The number of samples that a device has room for, tried before step 1 and stored in the run folder.

Each rank tries its share of the first batch by itself, and halves the parts for as long as its device is out of memory;
all ranks then take the smallest size of all, and the state from before the trials is restored. Where parts train
another model (batch norm, dropout) only the whole share is tried, again after it has grown, and the user must set a
size if it does not fit. Every restart takes the stored number of samples at a time, with other workers too: a share is
cut into parts as equal as can be, of at most that number."""

import json
import logging
from collections.abc import Iterator
from itertools import chain

import torch

from components.configuration.optimization import OptimizationConfig
from components.runtime import events
from components.runtime.storage.store import Store
from components.sampling.device import free, halves, is_out_of_memory
from components.training.checkpoint import generator_states, on_host, restore_generators
from components.training.loop import Batch, Task
from components.training.parallel import Worker, by_itself, lowest
from components.training.reporting import Reporter

logger = logging.getLogger(__name__)

KEPT = "memory.json"  # in the run folder: {"max_batch_per_device": ...}
# Share of a device's memory that a try leaves free: for what a rank by itself does not need (buffers of collectives,
# codes gathered from all ranks), for previews without an EMA (a copy of the network), and for fragments of many steps.
RESERVE = 0.05
LARGER = "take a smaller model, or a device with more memory"


class NoRoomError(RuntimeError):
    """A device lacks memory for the training; the message is a line with a setting as the remedy."""


def with_room(task: Task, batches: Iterator[Batch], reporter: Reporter, run: Store) -> Iterator[Batch]:
    """Set `task.max_batch` to the room of all ranks' devices. Returns the same batches.
    Called by every rank. Raises NoRoomError on all of them where there is no such number."""
    worker, steps = reporter.worker, reporter.config.total_steps
    try:
        stored = json.loads(run.read(KEPT))["max_batch_per_device"]
    except FileNotFoundError:
        stored = 0
    most = lowest(stored, worker)
    if reporter.start_step == steps:  # nothing is left but to evaluate, and no batch either
        task.max_batch = most or None
        return batches
    first = next(batches)
    share = len(first["position"])
    if most == 0 or (task.parts_matter and most < share):
        most = lowest(most_that_fits(task, first, step=steps, worker=worker), worker)
        if most == 0:
            raise NoRoomError(
                f"the {share} samples of a worker do not fit into the memory of {worker.device}, and parts of it would "
                "train another model (batch norm and dropout see one at a time): set max_batch_per_device in the "
                "profile if you want that, or more num_workers"
                if task.parts_matter
                else f"not even one sample at a time fits into the memory of {worker.device}: {LARGER}"
            )
        if worker.rank == 0:
            run.write(KEPT, json.dumps({"max_batch_per_device": most}).encode())
            line = f"memory for {min(most, share)} of a worker's {share} samples at a time"
            logger.info("%s: %s", reporter.stage, line)
            values = {"max_batch_per_device": float(most)}
            reporter.recorder.emit(events.Metrics(reporter.stage, reporter.start_step, values))
            if most < share:
                line += f": each step takes them in {-(-share // most)} parts"
                reporter.recorder.emit(events.Warning(reporter.stage, line))
    task.max_batch = even_part(share, most=most)
    return chain([first], batches)


def most_that_fits(task: Task, batch: Batch, *, step: int, worker: Worker) -> int:
    """The most samples at a time that fit in the calling rank's memory, tried by itself; 0 if none fits.
    The task and all generators are afterwards as they were, bit for bit."""
    before, generators = on_host(task.state_dict()), generator_states()
    share = len(batch["position"])
    with by_itself(worker):
        for samples in [share] if task.parts_matter else halves(share):
            task.max_batch = samples
            room = fits(task, batch, step=step, device=worker.device)
            task.load_state_dict(on_host(before))  # a copy: on a CPU the optimizer goes on with the given tensors
            restore_generators(generators)
            free(worker.device)
            if room:
                return samples
    return 0


def fits(task: Task, batch: Batch, *, step: int, device: torch.device) -> bool:
    """Try if two steps leave RESERVE of a GPU free.
    The second has the optimizer's state in memory from the start; `step` is the last, when all losses have begun."""
    total = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
    try:
        reserve = torch.empty(int(RESERVE * total), dtype=torch.uint8, device=device)
        for _ in range(2):
            task.train_step(batch, step)
        del reserve
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return False
    return True


def even_part(share: int, *, most: int) -> int:
    """Size of parts of a `share`: the fewest parts of at most `most` samples, as equal as can be."""
    parts = -(-share // most)
    return -(-share // parts)


def out_of_memory(error: RuntimeError, task: Task, config: OptimizationConfig, worker: Worker) -> str:
    """A line for a device that ran out of memory after all, with a remedy. Raises any other `error`."""
    if not is_out_of_memory(error):
        raise error
    share = worker.share(config.global_batch_size)
    samples = min(task.max_batch or share, share)
    smaller = f"set max_batch_per_device: {samples // 2} in the profile"
    remedy = smaller if samples > 1 else LARGER
    return f"{worker.device} of worker {worker.rank} is out of memory with {samples} samples at a time: {remedy}"
