"""A rank of a training on Ray Train: build the task, restore, train, report."""

import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import ray.train
import ray.train.torch
import torch
from ray.exceptions import RayTaskError
from ray.train import Checkpoint, CheckpointConsistencyMode, CheckpointUploadMode

import components
from components.configuration.optimization import OptimizationConfig
from components.data.stream import rank_batches
from components.runtime import events
from components.runtime.execution import Resources, node_threads
from components.runtime.ray_internals import get_train_context
from components.runtime.storage.store import SCRATCH, DamagedFileError, Store
from components.sampling.device import computes_bf16, state_products
from components.sampling.images import ColorError
from components.training.batches import batches_ahead
from components.training.checkpoint import (
    HostCopy,
    copy_to_host,
    gathered_on_host,
    refuse_non_finite,
    write_digests,
    write_host_copy,
)
from components.training.loop import Arrays, Batch, Task, fit, is_scheduled
from components.training.memory import NoRoomError, out_of_memory, with_room
from components.training.optim import NonFiniteError
from components.training.parallel import Worker, any_rank
from components.training.reporting import Reporter
from components.training.results import ModelDescription, finish
from components.training.run_folder import checkpoint_name, read_on_node, upload_folder
from components.training.snapshots import SNAPSHOTS, send_snapshots, write_snapshots
from components.training.speed import counted_flops, forget_peak_memory
from components.training.trace import traced

RUN_AGAIN = "run again: it goes on from its last checkpoint"


class UnreadableError(RuntimeError):
    """Data can't be read, and a restart would not help."""


class RayStream(NamedTuple):
    """The run's ordered data as a Ray Data dataset; whole blocks go to the ranks in turn."""

    make: Callable[..., "ray.data.Dataset"]  # called as make(start_step=, world_size=), whenever workers start


class RankStream(NamedTuple):
    """The run's ordered data, made by each rank for itself, for sets that fit in memory."""

    make: Callable[..., Iterator[Arrays]]  # called in each worker as make(rank=, world_size=, start_step=)


Stream = RayStream | RankStream


class TrainingJob(NamedTuple):
    """A training, as workers receive it; picklable."""

    make_task: Callable[..., Task]  # called with worker=
    config: OptimizationConfig
    stage: str
    run: Store
    stream: Stream
    held_out: Callable[[], Arrays]
    recorder: events.Recorder
    resources: Resources
    store: Store  # the stage's folder, where the model's files go
    model: ModelDescription
    tries_memory: bool  # workers measure how many samples they have room for at a time
    step_flops: Callable[[], float] | None = None  # counts FLOPs of a step of all ranks, forward and backward


def train_worker(arguments: dict[str, Any]) -> dict[str, str]:
    """The whole work of a rank: build the task, restore, train, report.

    Returns {} at the end, or the reason of an early end: {"stopped": why} if a restart would not help (numbers that are
    not finite, data, memory), {"preempted": step} if a node is taken away, {"damaged": name of the checkpoint, "why":
    …} if its state can't be read.
    """
    job: TrainingJob = arguments["job"]
    torch.set_num_threads(node_threads(job.resources))
    state_products(job.config.precision)
    if job.resources.low_priority:
        set_idle_priority()
    context = ray.train.get_context()
    ranks = context.get_world_size()
    shards = job.resources.sharding == "full" and ranks > 1
    worker = Worker(context.get_world_rank(), ranks, ray.train.torch.get_device(), shards)
    if worker.rank == 0:
        for line in differences(job, worker):
            job.recorder.emit(events.Warning(job.stage, line))
    task = job.make_task(worker=worker)
    task.max_batch = job.resources.max_batch_per_device
    restored = restore(task, job.run, worker)
    if isinstance(restored, dict):
        return restored
    start_step, seconds = restored
    stage, recorder, flops = job.stage, job.recorder, counted_flops(job.step_flops, worker)
    reporter = Reporter(
        job.config, stage=stage, worker=worker, recorder=recorder, start_step=start_step, step_flops=flops
    )
    try:
        held_out = read_held_out(job, worker)
    except UnreadableError as error:
        return {"stopped": str(error)}
    saver = Saver(job, reporter, held_out, seconds_before=seconds)
    batches = reporter.timed(job_batches(job, worker, start_step=start_step))
    try:
        if job.tries_memory:
            batches = with_room(task, batches, reporter, job.run)
            forget_peak_memory(worker.device)  # of the trials
        profiling = job.resources.profiling
        with traced(
            batches, profiling, stage=stage, worker=worker, recorder=recorder, start_step=start_step
        ) as traced_batches:
            reached = fit(
                task,
                traced_batches,
                job.config,
                start_step=start_step,
                log=reporter.log,
                save=saver.save,
                show=saver.show,
                leave=partial(is_leaving, worker),
                due=reporter.clock.is_due,
            )
    except (NonFiniteError, NoRoomError) as error:  # would only happen again: not a fault that a restart heals
        return {"stopped": str(error)}
    except (RayTaskError, ColorError) as error:
        # Neither does a restart heal a bad shard. Several ranks must fail together, so there Train restarts them.
        cause = error.cause if isinstance(error, RayTaskError) else error
        if worker.world_size > 1 or not is_own(cause):
            raise
        return {"stopped": str(cause)}
    except RuntimeError as error:
        line = out_of_memory(error, task, job.config, worker)
        if worker.world_size > 1:  # other ranks wait for this one: Train must end them
            raise NoRoomError(f"{line}, and {RUN_AGAIN}") from error
        return {"stopped": f"{line}, and {RUN_AGAIN}"}
    if reached < job.config.total_steps:
        return {"preempted": str(reached)}
    try:
        saver.finish(task)
    except RuntimeError as error:
        line = out_of_memory(error, task, job.config, worker)
        if worker.shards:
            raise NoRoomError(f"{line}, and {RUN_AGAIN}") from error
        return {"stopped": f"{line}, and {RUN_AGAIN}"}  # in rank 0: no other rank waits any more
    return {}


def differences(job: TrainingJob, worker: Worker) -> Iterator[str]:
    """Yields a line for each deviation of the training from recipe and profile."""
    if worker.world_size < job.resources.num_workers:
        yield f"room for {worker.world_size} of {job.resources.num_workers} workers"
    if job.resources.sharding == "full" and worker.world_size == 1:
        yield "sharding full needs several workers: the only one holds all"
    if job.config.precision == "bf16" and not computes_bf16("bf16", worker.device):
        yield f"{worker.device} has no bf16 of its own: training in fp32"


def set_idle_priority() -> None:
    """Run the calling thread, and threads started by it, only where a core would idle otherwise."""
    if hasattr(os, "SCHED_IDLE"):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    else:
        os.nice(19)


def is_leaving(worker: Worker) -> bool:
    """True if a node of the run is about to be taken away; the same on all ranks at each step.

    `ray.train.get_preemption_info` is as exact, but asks an actor each time, milliseconds a step.
    """
    return any_rank(get_train_context().preemption_context.preemption_info is not None, worker)


def read_held_out(job: TrainingJob, worker: Worker) -> Arrays:
    """Data for previews and evaluation, in rank 0; in all ranks where networks are in shards.

    Raises UnreadableError on all ranks for bad data.
    """
    arrays, why = {}, ""
    try:
        arrays = job.held_out() if worker.rank == 0 or worker.shards else {}
    except Exception as error:
        if not is_own(error):
            raise
        why = str(error)
    if any_rank(bool(why), worker):
        raise UnreadableError(why)
    return arrays


def has_snapshots(config: OptimizationConfig) -> bool:
    """True if snapshots of averages are stored; see `components.training.snapshots`."""
    return config.ema == "power" and config.ema_decay > 0


def is_own(error: Exception | None) -> bool:
    """True for this package's own errors, with a message for the user."""
    return type(error).__module__.startswith(f"{components.__name__}.")


def restore(task: Task, run: Store, worker: Worker) -> tuple[int, float] | dict[str, str]:
    """Restores Train's last checkpoint. Returns (steps taken, their seconds), or (0, 0.0) without any.

    Where any rank finds damage, all return {"damaged": name, "why": reason}.
    """
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return 0, 0.0
    name = PurePosixPath(checkpoint.path).name
    try:
        step, state = read_on_node(run, name, worker)
    except DamagedFileError as error:
        return {"damaged": name, "why": str(error)}
    seconds = state.pop("seconds")
    task.load_state_dict(state)
    return step, seconds


def job_batches(job: TrainingJob, worker: Worker, *, start_step: int) -> Iterator[Batch]:
    """The rank's share of each global batch. Raises RuntimeError for a stream at another step."""
    size = job.config.global_batch_size
    share = worker.share(size)
    if isinstance(job.stream, RankStream):
        rows = job.stream.make(rank=worker.rank, world_size=worker.world_size, start_step=start_step)
    else:
        shard = ray.train.get_dataset_shard("train")
        rows = rank_batches(shard, batch_size=share)
    yield from batches_ahead(in_place(rows, size, worker, start_step=start_step), worker.device)


def in_place(rows: Iterable[Arrays], size: int, worker: Worker, *, start_step: int) -> Iterator[Arrays]:
    """The same rows. Raises RuntimeError for rows of another rank or step."""
    share = worker.share(size)
    for step, arrays in enumerate(rows, start=start_step):
        expected = step * size + worker.rank * share
        if int(arrays["position"][0]) != expected or len(arrays["position"]) != share:
            raise RuntimeError(f"data are at sample {arrays['position'][0]}, training at {expected}")
        yield arrays


class Saver:
    """Checkpoints (every rank reports, rank 0 writes), previews and the finished model (rank 0).

    A checkpoint holds training while its state is copied to the host's memory. It is written, hashed and sent behind
    training, one at a time: the next one waits, so that memory and disk hold a single one. (Ray's own queue has no
    bound.)
    """

    def __init__(self, job: TrainingJob, reporter: Reporter, held_out: Arrays, *, seconds_before: float) -> None:
        self.job, self.reporter, self.held_out, self.seconds_before = job, reporter, held_out, seconds_before
        self.shards = reporter.worker.shards  # then all ranks take part wherever weights are needed
        self.idle = threading.Event()  # set while no checkpoint of the process is in transfer to the store
        self.idle.set()

    def show(self, step: int, task: Task) -> dict[str, bytes]:
        """Make previews, in rank 0; where the device has no room, warn and go on.

        Where weights are in shards all ranks make previews, and no rank can go on without the others.
        """
        if self.reporter.worker.rank > 0 and not self.shards:
            return {}
        try:
            return self.reporter.show(task, self.held_out, step)
        except RuntimeError as error:
            if self.shards:
                raise
            line = out_of_memory(error, task, self.job.config, self.reporter.worker)
            self.job.recorder.emit(events.Warning(self.job.stage, f"no preview at step {step}: {line}"))
            return {}

    def finish(self, task: Task) -> None:
        """Evaluate the finished model and write its files.

        Waits until the last checkpoint is in the store and in Train's list: a failure here then loses no step.
        """
        rank = self.reporter.worker.rank
        if rank > 0 and not self.shards:
            return
        ray.train.get_all_reported_checkpoints(consistency_mode=CheckpointConsistencyMode.COMMITTED)
        summary = self.summary(self.job.config.total_steps) | task.evaluate(self.held_out)
        previews = self.show(self.job.config.total_steps, task)
        weights = task.state_dict()["weights"]
        if self.shards:
            weights = gathered_on_host(weights, copies=rank == 0)
        if rank == 0:
            model = {"weights": weights, "summary": summary, "previews": previews}
            finish(self.job.run, self.job.store, self.job.model, **model)

    def summary(self, step: int) -> dict[str, float]:
        """The reporter's summary, with the width of the average where snapshots are stored."""
        config, summary = self.job.config, self.reporter.summary(self.seconds_before, step)
        return summary | ({"ema_sigma_rel": config.ema_sigma_rel} if has_snapshots(config) else {})

    def save(self, step: int, task: Task) -> None:
        """Save a checkpoint, a barrier over the ranks; waits until the last one is whole in the store.

        All ranks check their weights, equal or parts of the same, so that all stop if these are not finite.
        """
        begun, storage = time.monotonic(), ray.train.get_context().get_storage()
        refuse_non_finite(task.state_dict()["weights"], step=step, worker=self.reporter.worker)
        options: dict[str, Any] = {}
        if self.reporter.worker.rank == 0:
            folder, copy = self.begin(step, task)
            options["checkpoint"] = Checkpoint.from_directory(folder)
            options["checkpoint_upload_fn"] = partial(self.upload, copy=copy, storage=storage)
        elif self.shards:
            copy_to_host(task.state_dict(), step=step, worker=self.reporter.worker)  # rank 0 gathers
        last = step == self.job.config.total_steps
        ray.train.report(
            {"step": step},
            checkpoint_dir_name=checkpoint_name(step),
            checkpoint_upload_mode=CheckpointUploadMode.SYNC if last else CheckpointUploadMode.ASYNC,
            delete_local_checkpoint_after_upload=False,  # `upload` does, before the next one may begin
            **options,
        )
        self.reporter.held_seconds += time.monotonic() - begun
        self.reporter.clock.restart()

    def begin(self, step: int, task: Task) -> tuple[str, HostCopy]:
        """An empty folder on the node and a copy of the state, once the checkpoint before is in the store."""
        self.idle.wait()
        self.idle.clear()
        begun, seconds = time.monotonic(), self.summary(step)["train_seconds"]
        copy = copy_to_host(task.state_dict() | {"seconds": seconds}, step=step, worker=self.reporter.worker)
        self.reporter.copy_seconds += time.monotonic() - begun
        return tempfile.mkdtemp(prefix=f"{SCRATCH}checkpoint-"), copy

    def upload(self, checkpoint: Checkpoint, name: str, *, copy: HostCopy, storage: Any) -> Checkpoint:
        """Write a copy and send it, in a thread of Ray Train; then free memory and disk of the node."""
        folder = Path(checkpoint.path)
        try:
            self.send(copy, folder, name)
            copy.state.clear()
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            self.idle.set()
        return Checkpoint(storage.build_checkpoint_path_from_name(name), filesystem=storage.storage_filesystem)

    def send(self, copy: HostCopy, folder: Path, name: str) -> None:
        """Send snapshots, then the checkpoint, so that a checkpoint in the store has all its snapshots.

        Snapshots go next to the checkpoints, which Train removes in time.
        """
        config = self.job.config
        if has_snapshots(config) and is_scheduled(copy.step, config):
            write_snapshots(folder / SNAPSHOTS, copy.state, sigma_rel=config.ema_sigma_rel)
            send_snapshots(folder / SNAPSHOTS, self.job.run)
            shutil.rmtree(folder / SNAPSHOTS)
        write_host_copy(folder / name, copy)
        write_digests(folder / name)
        upload_folder(folder / name, self.job.run, name)
