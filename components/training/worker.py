"""A rank of a training on Ray Train: build the task, restore, train, report."""

import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import ray.train
import ray.train.torch
import torch
from ray.exceptions import RayTaskError
from ray.train import Checkpoint, CheckpointConsistencyMode, CheckpointUploadMode
from torch import nn

import components
from components.configuration.optimization import OptimizationConfig
from components.data.listing import ShardError
from components.models.devices import products, state_products
from components.runtime import events
from components.runtime.execution import Resources, node_threads
from components.runtime.ray_internals import get_train_context
from components.runtime.storage.scratch import scratch_folder
from components.runtime.storage.store import DamagedFileError, Store
from components.sampling.device import computes_bf16
from components.sampling.images import ColorError
from components.training.batches import batches_ahead
from components.training.checkpoint import HostCopy, copy_to_host, refuse_non_finite, write_host_copy
from components.training.loop import Arrays, Task, fit, is_scheduled
from components.training.memory import NoRoomError, out_of_memory, with_room
from components.training.optim import DivergedError, NonFiniteError
from components.training.parallel import Worker, any_rank
from components.training.reporting import NOTHING, Reporter, counted_flops, traced
from components.training.results import SNAPSHOTS, ModelDescription, finish, write_snapshots
from components.training.rows import send_rows
from components.training.run_folder import checkpoint_name, restore_on_node, upload_folder

RUN_AGAIN = "run again: it goes on from its last checkpoint"


class UnreadableError(RuntimeError):
    """Data can't be read, and a restart would not help."""


class TrainingJob(NamedTuple):
    """A training, as workers receive it; picklable."""

    make_task: Callable[..., Task]  # called in each worker as make_task(worker=)
    config: OptimizationConfig
    stage: str
    key: str  # the run's name below `folder`; equal keys resume each other
    folder: Store
    stream: Callable[..., Iterator[Arrays]]  # stream(rank=, world_size=, start_step=), in each worker
    held_out: Callable[[], Arrays]  # called in rank 0; data of previews and the final evaluation
    recorder: events.Recorder
    resources: Resources
    store: Store  # the stage's folder, where the model's files go
    model: ModelDescription
    tries_memory: bool | None = None  # measure the room for samples, where not told; None: on GPUs
    load_start: Callable[[nn.Module], None] | None = None  # gives first weights, not to a resumed run
    step_flops: Callable[[], float] | None = None  # FLOPs of a step of all ranks, in rank 0; None: no MFU

    @property
    def run(self) -> Store:
        """The run folder."""
        return self.folder.join(self.key)


def train_worker(arguments: dict[str, Any]) -> dict[str, str]:
    """The whole work of a rank: build the task, restore, train, report.
    Returns {} at the end, or the reason of an early one: {"stopped": why} if a restart would not help, {"preempted":
    step} if a node is taken away, {"damaged": name of the checkpoint, "why": …} if its state can't be read."""
    job: TrainingJob = arguments["job"]
    torch.set_num_threads(node_threads(job.resources))
    state_products(job.config.precision)
    if job.resources.low_priority:
        set_idle_priority()
    context = ray.train.get_context()
    ranks = context.get_world_size()
    parts = job.resources.shards(ranks)
    device, replicas = ray.train.torch.get_device(), ranks // parts if parts > 1 else 1
    worker = Worker(context.get_world_rank(), ranks, device, parts > 1, replicas)
    if worker.rank == 0:
        for line in differences(job, worker):
            job.recorder.emit(events.Warning(job.stage, line))
    checkpoint, start_step, before = ray.train.get_checkpoint(), 0, NOTHING
    options = {"load_start": job.load_start} if job.load_start is not None and checkpoint is None else {}
    task = job.make_task(worker=worker, **options)
    task.max_batch = job.resources.max_batch_per_device
    if checkpoint is not None:
        name = PurePosixPath(checkpoint.path).name
        try:
            start_step, before = restore_on_node(job.run, name, task, worker)
        except DamagedFileError as error:  # on all ranks
            return {"damaged": name, "why": str(error)}
    place: dict[str, Any] = {"stage": job.stage, "worker": worker, "recorder": job.recorder, "start_step": start_step}
    # `ray.train.get_preemption_info` is as exact, but asks an actor each time, milliseconds a step.
    preemption, trained = get_train_context().preemption_context, False
    reporter = Reporter(
        job.config,
        **place,
        before=before,
        step_flops=counted_flops(job.step_flops, worker),
        is_taken_away=lambda: preemption.preemption_info is not None,
    )
    try:
        saver = Saver(job, reporter, read_held_out(job, worker))
        batches = reporter.timed(batches_ahead(job_rows(job, worker, start_step=start_step), worker.device))
        tries = job.resources.gpus_per_worker > 0 if job.tries_memory is None else job.tries_memory
        if tries and job.resources.max_batch_per_device is None:
            batches = with_room(task, batches, reporter, job.run)
            if worker.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(worker.device)  # of the trials
        with traced(batches, job.resources.profiling, **place) as traced_batches:
            reached = fit(
                task,
                traced_batches,
                job.config,
                start_step=start_step,
                log=reporter.log,
                save=saver.save,
                show=saver.show,
                leave=lambda: reporter.clock.leaving,
                due=reporter.is_due,
            )
        if reached < job.config.total_steps:
            return {"preempted": str(reached)}
        trained = True
        saver.finish(task)
    except (NonFiniteError, DivergedError, NoRoomError, UnreadableError) as error:  # would happen again
        return {"stopped": str(error)}
    except (RayTaskError, ShardError, ColorError) as error:
        # Neither does a restart heal a bad shard. Several ranks must fail together, so there Train restarts them.
        cause = error.cause if isinstance(error, RayTaskError) else error
        if worker.world_size > 1 or not is_own(cause):
            raise
        return {"stopped": str(cause)}
    except RuntimeError as error:
        line = f"{out_of_memory(error, task, job.config, worker)}, and {RUN_AGAIN}"
        if worker.shards or (worker.world_size > 1 and not trained):  # other ranks wait: Train must end them
            raise NoRoomError(line) from error
        return {"stopped": line}
    finally:
        job.recorder.settle()
    return {}


def differences(job: TrainingJob, worker: Worker) -> Iterator[str]:
    """Yields a line for each deviation of the training from recipe and profile."""
    if worker.world_size < job.resources.num_workers:
        yield f"room for {worker.world_size} of {job.resources.num_workers} workers"
    if job.resources.sharding != "none" and worker.world_size == 1:
        yield f"sharding {job.resources.sharding} needs several workers: the only one holds all"
    if job.config.precision == "bf16" and worker.device.type != "cpu" and not computes_bf16("bf16", worker.device):
        yield f"{worker.device} has no bf16 of its own: training in fp32"


def set_idle_priority() -> None:
    """Run the calling thread, and threads started by it, only where a core would idle otherwise."""
    if hasattr(os, "SCHED_IDLE"):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    else:
        os.nice(19)


def read_held_out(job: TrainingJob, worker: Worker) -> Arrays:
    """Data for previews and evaluation, where needed. Raises UnreadableError on all ranks for bad data."""
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


def is_own(error: Exception | None) -> bool:
    """True for this package's own errors, with a message for the user."""
    return type(error).__module__.startswith(f"{components.__name__}.")


def job_rows(job: TrainingJob, worker: Worker, *, start_step: int) -> Iterator[Arrays]:
    """The rank's share of each global batch. Raises RuntimeError for rows of another rank or step."""
    size = job.config.global_batch_size
    rows = job.stream(rank=worker.rank, world_size=worker.world_size, start_step=start_step)
    for step, arrays in enumerate(rows, start=start_step):
        expected = np.arange(step * size + worker.rank, (step + 1) * size, worker.world_size)
        if not np.array_equal(arrays["position"], expected):
            raise RuntimeError(f"data are at sample {arrays['position'][0]}, training at {expected[0]}")
        yield arrays


class Saver:
    """Checkpoints, previews and the finished model.
    Every rank reports a checkpoint; rank 0 writes it, with shards each rank its part. It is written and sent behind
    training, one at a time, so memory and disk hold a single one (Ray's queue has no bound)."""

    def __init__(self, job: TrainingJob, reporter: Reporter, held_out: Arrays) -> None:
        self.job, self.reporter, self.held_out = job, reporter, held_out
        self.worker, self.shards = reporter.worker, reporter.worker.shards  # shards: on all ranks
        self.has_snapshots = job.config.ema == "power" and job.config.ema_decay > 0
        self.idle = threading.Event()  # set while no checkpoint of the process is in transfer to the store
        self.idle.set()

    def show(self, step: int, task: Task) -> dict[str, bytes]:
        """Make and report previews, in rank 0 or, with shards, in all; where one rank alone has no room, warn."""
        if self.worker.rank > 0 and not self.shards:
            return {}
        try:
            images = task.preview(self.held_out, step)
        except RuntimeError as error:
            if self.shards:
                raise
            line = out_of_memory(error, task, self.job.config, self.worker)
            self.job.recorder.emit(events.Warning(self.job.stage, f"no preview at step {step}: {line}"))
            return {}
        for name, png in images.items() if self.worker.rank == 0 else ():
            self.job.recorder.emit(events.Image(self.job.stage, step, name, png))
        return images

    def finish(self, task: Task) -> None:
        """Evaluate the finished model and write its files.
        Waits until the last checkpoint is in the store and in Train's list: a failure here then loses no step."""
        if self.worker.rank > 0 and not self.shards:
            return
        ray.train.get_all_reported_checkpoints(consistency_mode=CheckpointConsistencyMode.COMMITTED)
        config = self.job.config
        summary = self.reporter.summary(config.total_steps)
        summary |= {"ema_sigma_rel": config.ema_sigma_rel} if self.has_snapshots else {}
        with products("fp32"):  # what compares models has no rounding of a recipe's own
            summary |= task.evaluate(self.held_out)
        previews = self.show(config.total_steps, task)
        model = {"weights": task.state_dict()["weights"], "summary": summary, "previews": previews}
        finish(self.job.run, self.job.store, self.job.model, worker=self.worker, **model)

    def save(self, step: int, task: Task) -> None:
        """Save a checkpoint, a barrier over the ranks; waits until the last one is whole in the store.
        All ranks check their weights, equal or parts of the same, so that all stop if these are not finite."""
        begun, storage = time.monotonic(), ray.train.get_context().get_storage()
        refuse_non_finite(task.state_dict()["weights"], step=step, worker=self.worker)
        options: dict[str, Any] = {}
        if self.worker.rank < (self.worker.parts if self.shards else 1):
            self.idle.wait()
            self.idle.clear()
            copying = time.monotonic()
            state = task.state_dict() | {"elapsed": list(self.reporter.elapsed())}
            copy = copy_to_host(state, step=step, worker=self.worker)
            keeps = self.has_snapshots and is_scheduled(step, self.job.config)
            self.reporter.copy_seconds += time.monotonic() - copying
            place = storage.build_checkpoint_path_from_name(checkpoint_name(step, self.job.run))
            options["checkpoint"] = Checkpoint(place, filesystem=storage.storage_filesystem)
            options["checkpoint_upload_fn"] = partial(self.upload, copy=copy, keeps=keeps)
        last = step == self.job.config.total_steps
        ray.train.report(
            {"step": step},
            checkpoint_dir_name=checkpoint_name(step, self.job.run),
            checkpoint_upload_mode=CheckpointUploadMode.SYNC if last else CheckpointUploadMode.ASYNC,
            delete_local_checkpoint_after_upload=False,  # it is where it will be, and `upload` brings it there
            **options,
        )
        self.reporter.held_seconds += time.monotonic() - begun
        self.reporter.clock.restart()

    def upload(self, checkpoint: Checkpoint, name: str, *, copy: HostCopy, keeps: bool) -> Checkpoint:
        """Write a part and send it, in a thread of Ray Train; then free memory and disk of the node.
        Snapshots, where the step `keeps` them, are sent first, so that a checkpoint in the store has all of its own."""
        config, run = self.job.config, self.job.run
        try:
            with scratch_folder("checkpoint") as folder:
                if keeps:
                    write_snapshots(folder / SNAPSHOTS, copy, sigma_rel=config.ema_sigma_rel)
                    send_rows(folder / SNAPSHOTS, run.join(SNAPSHOTS), parts=copy.parts)
                    shutil.rmtree(folder / SNAPSHOTS)
                write_host_copy(folder / name, copy)
                upload_folder(folder / name, run, name)
                copy.tensors.clear()
        finally:
            self.idle.set()
        return checkpoint
