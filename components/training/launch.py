"""Data-parallel training on Ray Train v2: the only import of ray.train.

A run is named by its stage's key, so starting it again resumes it: Train restores the list of checkpoints from the run
folder, restarted workers load the last one, and the data stream is rebuilt from its step.
"""

import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import ray.train
import ray.train.torch
import torch
from ray.exceptions import ActorDiedError, RayTaskError
from ray.train import Checkpoint, CheckpointUploadMode
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.context import get_train_context

from components.execution import Recorder, Resources
from components.storage.store import DamagedFileError, Store
from components.training.batches import to_batch
from components.training.checkpoint import read_checkpoint, refuse_non_finite, write_checkpoint, write_digests
from components.training.config import TrainingConfig
from components.training.guard import NonFiniteError
from components.training.loop import Arrays, Batch, Task, fit, is_scheduled
from components.training.parallel import Worker, any_rank
from components.training.reporting import Reporter
from components.training.results import SUMMARY
from components.training.run_folder import (
    checkpoint_name,
    download_folder,
    fetch_checkpoint,
    forget_checkpoint,
    last_checkpoint,
    storage_of,
    upload_folder,
)
from components.training.snapshots import SNAPSHOTS, write_snapshots

logger = logging.getLogger(__name__)
CHECKPOINTS_KEPT = 2
CLEANER_SECONDS = 1.0
PREFETCHED_BATCHES = 4


class TrainingError(RuntimeError):
    """A training stopped for good; one line that says why and what to try."""


class UnreadableError(RuntimeError):
    """Data can't be read, and no restart would change that."""


class RayStream(NamedTuple):
    """The run's ordered data as one Ray Data dataset; whole blocks go to the ranks in turn."""

    make: Callable[..., "ray.data.Dataset"]  # called as make(start_step=), whenever workers start


class RankStream(NamedTuple):
    """The run's ordered data as each rank makes its own share of them, for sets that fit in memory."""

    make: Callable[..., Iterator[Arrays]]  # called in each worker as make(rank=, world_size=, start_step=)


Stream = RayStream | RankStream


class Job(NamedTuple):
    """All that a worker needs; picklable."""

    make_task: Callable[..., Task]  # called with worker=
    config: TrainingConfig
    stage: str
    run: Store
    stream: Stream
    held_out: Callable[[], Arrays]
    recorder: Recorder
    threads: int


def train(
    make_task: Callable[..., Task],
    *,
    config: TrainingConfig,
    stage: str,
    key: str,
    folder: Store,
    stream: Stream,
    held_out: Callable[[], Arrays],
    recorder: Recorder,
    resources: Resources,
    scratch: Path,
) -> Path:
    """Train until config.total_steps, resuming what is in `folder`, and return a local copy of the final state.

    Args:
        make_task: called in each worker as make_task(worker=...).
        key: the run's name below `folder`; equal keys resume each other.
        stream: the ordered data of the whole run, from any step on.
        held_out: called in rank 0; what previews and the final evaluation see.
        scratch: local folder for the copy.

    Returns the folder of the last checkpoint: its files, `summary.json`, the last previews as PNG, and the snapshots of
    a power EMA.

    Raises:
        TrainingError: the batch does not divide by the workers, losses stopped being finite, data can't be read, or
            workers failed more than resources.max_failures times.
    """
    if config.global_batch_size % resources.num_workers:
        raise TrainingError(
            f"{stage}: global_batch_size {config.global_batch_size} is no multiple of {resources.num_workers} workers; "
            "set num_workers in the profile, or another global_batch_size"
        )
    run = folder.join(key)
    job = Job(make_task, config, stage, run, stream, held_out, recorder, resources.threads)
    while (state := final_state(job, scratch)) is None:
        again = run_trainer(job, key=key, folder=folder, resources=resources)
        done = last_checkpoint(run)
        if not again and (done is None or done.step < config.total_steps):
            raise TrainingError(f"{stage} ended at step {done.step if done else 0} of {config.total_steps}; run again")
    return state


def final_state(job: Job, scratch: Path) -> Path | None:
    """A local copy of the run's last checkpoint with its snapshots; None if training has not come to its end."""
    done = last_checkpoint(job.run)
    if done is None or done.step < job.config.total_steps:
        return None
    try:
        state = fetch_checkpoint(job.run, done.name, scratch / done.name)
    except DamagedFileError as error:
        fall_back(job, done.name, str(error))
        return None
    download_folder(job.run, SNAPSHOTS, state / SNAPSHOTS)
    return state


def fall_back(job: Job, name: str, why: str) -> None:
    """Make the checkpoint before a damaged one the last, and say so."""
    before = forget_checkpoint(job.run, name)
    place = f"the checkpoint of step {before.step}" if before else "the start: there is no other checkpoint"
    line = f"a checkpoint is damaged ({why}); going on from {place}"
    logger.warning("%s: %s", job.stage, line)
    job.recorder.warning(job.stage, line)


def run_trainer(job: Job, *, key: str, folder: Store, resources: Resources) -> bool:
    """Run Ray Train in the run folder `folder/key`. Raises TrainingError with the worker's own last line.

    Returns whether it has to run again: a checkpoint was damaged, or a node is taken away and training left it in time.
    """
    path, filesystem = storage_of(folder)
    trainer = Trainer(
        train_worker,
        train_loop_config={"job": job},
        scaling_config=ray.train.ScalingConfig(
            num_workers=resources.num_workers,
            use_gpu=resources.gpus_per_worker > 0,
            resources_per_worker=worker_resources(resources),
        ),
        run_config=ray.train.RunConfig(
            name=key,
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=ray.train.FailureConfig(max_failures=resources.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=CHECKPOINTS_KEPT),
        ),
        datasets={"train": partial(resumed, job.stream, job.run)} if isinstance(job.stream, RayStream) else None,
        dataset_config=OrderedShards(),
    )
    try:
        result = trainer.fit()
    except ray.train.TrainingFailedError as error:
        raise TrainingError(f"{job.stage} failed: {last_line(error)}") from error
    except ActorDiedError as error:
        raise TrainingError(f"{job.stage}: Ray Train's controller died; run again to go on from here") from error
    ended = result.return_value or {}
    if "stopped" in ended:
        raise TrainingError(f"{job.stage} stopped: {ended['stopped']}")
    if "damaged" in ended:
        fall_back(job, ended["damaged"], ended["why"])
    if "preempted" in ended:
        line = f"a node is being taken away: saved at step {ended['preempted']}, going on elsewhere"
        logger.warning("%s: %s", job.stage, line)
        job.recorder.warning(job.stage, line)
    return bool(ended)


class Trainer(ray.train.torch.TorchTrainer):
    """Ends within a second where there is no dashboard.

    Ray 2.60 starts an actor that removes the placement group if the controller dies. It asks the dashboard whether the
    controller lives; without a dashboard it hears nothing and the end of each training waits 12 seconds for it.
    """

    def _create_default_callbacks(self) -> list[Any]:
        callbacks = super()._create_default_callbacks()
        for callback in callbacks:
            if isinstance(callback, PlacementGroupCleanerCallback):
                callback._stop_timeout = CLEANER_SECONDS
        return callbacks


def worker_resources(resources: Resources) -> dict[str, float]:
    """Logical resources of one worker; the budget must leave CPUs for the tasks that read data."""
    wanted = {"CPU": resources.cpus_per_worker}
    return wanted | ({"GPU": resources.gpus_per_worker} if resources.gpus_per_worker else {})


def resumed(stream: RayStream, run: Store) -> "ray.data.Dataset":
    """The stream from the checkpoint that workers are about to load; called at each start of a worker group."""
    done = last_checkpoint(run)
    return stream.make(start_step=done.step if done else 0)


class OrderedShards(ray.train.DataConfig):
    """Block i goes to rank i modulo the number of ranks: the order that makes a global batch (ray-notes, item 13)."""

    def configure(
        self, datasets: dict[str, "ray.data.Dataset"], world_size: int, *unused: Any, **also_unused: Any
    ) -> list[dict[str, "ray.data.DataIterator"]]:
        shards: list[dict[str, ray.data.DataIterator]] = [{} for _ in range(world_size)]
        for name, dataset in datasets.items():
            dataset.context.execution_options.preserve_order = True
            for shard, split in zip(shards, dataset.streaming_split(world_size, equal=False), strict=True):
                shard[name] = split
        return shards


def train_worker(arguments: dict[str, Any]) -> dict[str, str]:
    """One rank: build the task, restore it, train, report.

    Returns how it ended before its time: {"stopped": why} if the guard stopped it, {"preempted": step} if a node is
    taken away, {"damaged": name of the checkpoint, "why": …} if its state can't be read.
    """
    job: Job = arguments["job"]
    torch.set_num_threads(job.threads)
    context = ray.train.get_context()
    worker = Worker(context.get_world_rank(), context.get_world_size(), ray.train.torch.get_device())
    task = job.make_task(worker=worker)
    restored = restore(task, job.run, worker)
    if isinstance(restored, dict):
        return restored
    start_step, seconds = restored
    reporter = Reporter(job.config, stage=job.stage, worker=worker, recorder=job.recorder, start_step=start_step)
    try:
        held_out = read_held_out(job, worker)
    except UnreadableError as error:
        return {"stopped": str(error)}
    saver = Saver(job, reporter, held_out, seconds_before=seconds)
    batches = reporter.timed(rank_batches(job, worker, start_step=start_step))
    acts: dict[str, Any] = {"log": reporter.log, "save": saver.save, "show": saver.show}
    try:
        reached = fit(task, batches, job.config, start_step=start_step, leave=partial(is_leaving, worker), **acts)
    except NonFiniteError as error:  # would only happen again: not a fault that a restart heals
        return {"stopped": str(error)}
    except RayTaskError as error:
        # Neither does a restart heal a bad shard. Several ranks must fail together, so there Train restarts them.
        if worker.world_size > 1 or not is_own(error.cause):
            raise
        return {"stopped": str(error.cause)}
    return {} if reached == job.config.total_steps else {"preempted": str(reached)}


def is_leaving(worker: Worker) -> bool:
    """Whether Ray was told that a node of this run is about to be taken away; all ranks hear of it at the same step.

    `ray.train.get_preemption_info` says the same and is as exact, but asks an actor each time, milliseconds a step.
    """
    return any_rank(get_train_context().preemption_context.preemption_info is not None, worker)


def read_held_out(job: Job, worker: Worker) -> Arrays:
    """What rank 0 shows and evaluates on; nothing on the others. Raises UnreadableError on all ranks if it is bad."""
    arrays, why = {}, ""
    try:
        arrays = job.held_out() if worker.rank == 0 else {}
    except Exception as error:
        if not is_own(error):
            raise
        why = str(error)
    if any_rank(bool(why), worker):
        raise UnreadableError(why)
    return arrays


def is_own(error: Exception | None) -> bool:
    """Whether an error was raised by this package, with a message of one line for the user."""
    return type(error).__module__.startswith("components.")


def restore(task: Task, run: Store, worker: Worker) -> tuple[int, float] | dict[str, str]:
    """(steps taken, seconds they took): from Train's last checkpoint, or (0, 0.0).

    Where any rank finds it damaged, all return its name and why.
    """
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return 0, 0.0
    name, why, found = PurePosixPath(checkpoint.path).name, "", None
    try:
        with tempfile.TemporaryDirectory(prefix="cascade-restore-") as folder:
            found = read_checkpoint(fetch_checkpoint(run, name, Path(folder)))
    except DamagedFileError as error:
        why = str(error)
    if any_rank(found is None, worker) or found is None:
        return {"damaged": name, "why": why or "another worker can't read it"}
    step, state = found
    seconds = state.pop("seconds")
    task.load_state_dict(state)
    return step, seconds


def rank_batches(job: Job, worker: Worker, *, start_step: int) -> Iterator[Batch]:
    """This rank's share of each global batch. Raises RuntimeError if the stream is not where training is."""
    size = job.config.global_batch_size
    share = worker.share(size)
    if isinstance(job.stream, RankStream):
        rows = job.stream.make(rank=worker.rank, world_size=worker.world_size, start_step=start_step)
    else:
        shard = ray.train.get_dataset_shard("train")
        rows = shard.iter_batches(batch_size=share, batch_format="numpy", prefetch_batches=PREFETCHED_BATCHES)
    for step, arrays in enumerate(rows, start=start_step):
        batch = to_batch(arrays, worker.device)
        expected = step * size + worker.rank * share
        if int(arrays["position"][0]) != expected or len(arrays["position"]) != share:
            raise RuntimeError(f"data are at sample {arrays['position'][0]}, training at {expected}")
        yield batch


class Saver:
    """Checkpoints (every rank reports, rank 0 writes) and pictures (rank 0)."""

    def __init__(self, job: Job, reporter: Reporter, held_out: Arrays, *, seconds_before: float) -> None:
        self.job, self.reporter, self.held_out, self.seconds_before = job, reporter, held_out, seconds_before
        self.pictures: dict[str, bytes] = {}

    def show(self, step: int, task: Task) -> None:
        if self.reporter.worker.rank == 0:
            self.pictures = self.reporter.show(task, self.held_out, step)

    def save(self, step: int, task: Task) -> None:
        """A barrier over the ranks. The upload goes on in the background; Train deletes the local copy after it.

        All ranks look at their weights, which are equal, so that all stop if these are not finite.
        """
        refuse_non_finite(task.state_dict()["weights"], step=step)
        checkpoint = self.write(step, task) if self.reporter.worker.rank == 0 else None
        ray.train.report(
            {"step": step},
            checkpoint=checkpoint,
            checkpoint_dir_name=checkpoint_name(step),
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
            checkpoint_upload_fn=partial(self.upload, storage=ray.train.get_context().get_storage()),
        )

    def write(self, step: int, task: Task) -> Checkpoint:
        folder, config = Path(tempfile.mkdtemp(prefix="cascade-checkpoint-")), self.job.config
        summary = self.reporter.summary(self.seconds_before, step)
        state = task.state_dict() | {"seconds": summary["train_seconds"]}
        write_checkpoint(folder, state, step=step)
        if config.ema == "power" and config.ema_decay > 0 and is_scheduled(step, config):
            write_snapshots(folder / SNAPSHOTS, state, sigma_rel=config.ema_sigma_rel)
            summary["ema_sigma_rel"] = config.ema_sigma_rel
        if step == config.total_steps:
            (folder / SUMMARY).write_text(json.dumps(summary | task.evaluate(self.held_out)))
            for name, png in self.pictures.items():
                (folder / f"{name}.png").write_bytes(png)
        return Checkpoint.from_directory(str(folder))

    def upload(self, checkpoint: Checkpoint, name: str, *, storage: Any) -> Checkpoint:
        """Snapshots go beside the checkpoints, which Train removes, and first: a checkpoint is then complete."""
        folder = Path(checkpoint.path)
        if (folder / SNAPSHOTS).is_dir():
            upload_folder(folder / SNAPSHOTS, self.job.run, SNAPSHOTS)
            shutil.rmtree(folder / SNAPSHOTS)
        write_digests(folder)  # here, not in `write`: training does not wait for it
        upload_folder(folder, self.job.run, name)
        return Checkpoint(storage.build_checkpoint_path_from_name(name), filesystem=storage.storage_filesystem)


def last_line(error: Exception) -> str:
    """The line of a worker's traceback that says what happened."""
    failures = getattr(error, "worker_failures", None) or {0: error}
    lines = str(next(iter(failures.values()))).strip().splitlines() or [type(error).__name__]
    return lines[-1].strip()
