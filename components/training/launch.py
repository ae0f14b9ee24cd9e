"""The driver's side of data-parallel training on Ray Train v2; `worker.py` is the ranks' side.
A run is named by its stage's key, so starting it again resumes it: Train restores the list of checkpoints from the run
folder, restarted workers load the last one and read data from its step on, whatever their number."""

import logging
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import ray.train
import ray.train.torch
from ray.exceptions import ActorDiedError

import components
from components.runtime import events
from components.runtime.pool import portable
from components.runtime.ray_internals import (
    DefaultFailurePolicy,
    EqualShares,
    FailureDecision,
    PlacementGroupCleanerCallback,
    get_webui_url_from_internal_kv,
)
from components.runtime.storage import outages
from components.runtime.storage.artifact import verify_files
from components.runtime.storage.connection import AwayError
from components.runtime.storage.store import Store
from components.training.results import FINISHED, Trained, read_finished
from components.training.run_folder import forget_checkpoint, last_checkpoint, storage_of
from components.training.worker import TrainingJob, train_worker

logger = logging.getLogger(__name__)
CHECKPOINTS_KEPT = 2
GANG_SECONDS = 1800  # for the other ranks, beyond those for storage
# Prefix of this package's own errors in a traceback, in front of a message for the user.
OWN_ERROR = re.compile(rf"^{re.escape(components.__name__)}\.[\w.]+: ")


class TrainingError(RuntimeError):
    """A training stopped for good; the message is a line with the reason and a remedy."""


def train(job: TrainingJob) -> Trained:
    """Train to the end, resuming a run in the run folder, and leave the model's files in `job.store`.
    Weights never pass through the driver. Raises HandoverError where values for workers hold a path of this node, and
    TrainingError if the batch does not divide by the workers, losses stop being finite, data can't be read, a device
    has too little memory, or workers fail more than resources.max_failures times between two checkpoints."""
    stage, config, run = job.stage, job.config, job.run
    if not job.resources.worker_counts(config.global_batch_size):
        raise TrainingError(
            f"{stage}: global_batch_size {config.global_batch_size} is no multiple of {job.resources.num_workers} "
            "workers; set num_workers in the profile, or another global_batch_size"
        )
    finished = read_finished(run)
    damage = [] if finished is None else verify_files(job.store, finished.entries)
    if damage:  # of an earlier try
        warn(job, f"{damage[0]}; the model's files are made again from the last checkpoint")
        run.delete(FINISHED)
    while (trained := read_finished(run)) is None:
        again = run_trainer(portable(job, what=f"the job of stage {stage}"))
        if not again and read_finished(run) is None:
            raise TrainingError(f"{stage} ended at step {steps_saved(run)} of {config.total_steps}; run again")
    return trained


def steps_saved(run: Store) -> int:
    """Steps of the last checkpoint of a run folder; 0 without one. Raises as `last_checkpoint`."""
    done = last_checkpoint(run)
    return done.step if done else 0


def warn(job: TrainingJob, line: str) -> None:
    """Tell the user a line, now and in the report."""
    logger.warning("%s: %s", job.stage, line)
    job.recorder.emit(events.Warning(job.stage, line))


def run_trainer(job: TrainingJob) -> bool:
    """Run Ray Train in the run folder. Raises TrainingError with the worker's own last line.
    Returns True to run again: a checkpoint was damaged, or training left a node in time that is taken away."""
    path, filesystem = storage_of(job.folder)
    resources, counts = job.resources, job.resources.worker_counts(job.config.global_batch_size)
    trainer = Trainer(
        train_worker,
        worker_counts=counts,
        saved=partial(steps_saved, job.run),
        train_loop_config={"job": job},
        # Ranks wait for the one that waits for storage.
        torch_config=ray.train.torch.TorchConfig(timeout_s=int(GANG_SECONDS + outages.patience())),
        scaling_config=ray.train.ScalingConfig(
            num_workers=counts[-1] if len(counts) == 1 else (counts[0], counts[-1]),
            use_gpu=resources.gpus_per_worker > 0,
            resources_per_worker={"CPU": resources.cpus_per_worker}
            | ({"GPU": resources.gpus_per_worker} if resources.gpus_per_worker else {}),
        ),
        run_config=ray.train.RunConfig(
            name=job.key,
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=ray.train.FailureConfig(max_failures=resources.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=CHECKPOINTS_KEPT),
        ),
    )
    try:
        result = trainer.fit()
    except ray.train.TrainingFailedError as error:
        failures = getattr(error, "worker_failures", None) or {0: error}
        lines = [(str(each).strip().splitlines() or [type(error).__name__])[-1].strip() for each in failures.values()]
        line = next(filter(OWN_ERROR.match, lines), lines[0])  # the other ranks' errors are of its end
        raise TrainingError(f"{job.stage} failed: {OWN_ERROR.sub('', line)}") from error
    except ActorDiedError as error:
        raise TrainingError(f"{job.stage}: Ray Train's controller died; run again to go on from here") from error
    ended = result.return_value or {}
    if "stopped" in ended:
        raise TrainingError(f"{job.stage} stopped: {ended['stopped']}")
    if "damaged" in ended:
        before = forget_checkpoint(job.run, ended["damaged"])  # so that the one before is the last
        place = f"the checkpoint of step {before.step}" if before else "the start: there is no other checkpoint"
        warn(job, f"a checkpoint is damaged ({ended['why']}); going on from {place}")
    if "preempted" in ended:
        warn(job, f"a node is being taken away: saved at step {ended['preempted']}, going on elsewhere")
    return bool(ended)


class ByProgress(DefaultFailurePolicy):
    """Ray's policy, which counts losses of workers anew once a checkpoint was saved since the last one.
    `saved`: steps of the last checkpoint. A store that was away for too long ends the training at once."""

    def __init__(self, failure_config: ray.train.FailureConfig, *, saved: Callable[[], int]) -> None:
        super().__init__(failure_config)
        self.saved, self.before = saved, -1

    def make_decision(self, training_failed_error: Any) -> FailureDecision:
        if AwayError.__name__ in str(training_failed_error):
            return FailureDecision.RAISE
        if (steps := self.saved()) > self.before:
            self.before, self._worker_group_failures = steps, 0
        return super().make_decision(training_failed_error)


class Trainer(ray.train.torch.TorchTrainer):
    """Ray's trainer, for numbers of workers in `worker_counts`, and without a useless actor.
    `saved`: steps of the last checkpoint; losses of workers count between two of them.
    Ray 2.60's actor that removes the placement group after a dead controller asks the dashboard whether that lives;
    without a dashboard it hears nothing, and costs 12 seconds at the end."""

    def __init__(
        self, *arguments: Any, worker_counts: list[int], saved: Callable[[], int] = lambda: 0, **options: Any
    ) -> None:
        super().__init__(*arguments, **options)
        self.worker_counts, self.saved = worker_counts, saved

    def _create_default_callbacks(self) -> list[Any]:
        callbacks = super()._create_default_callbacks()
        if get_webui_url_from_internal_kv():
            return callbacks
        return [callback for callback in callbacks if not isinstance(callback, PlacementGroupCleanerCallback)]

    def _initialize_and_run_controller(self, **arguments: Any) -> ray.train.Result:
        arguments["failure_policy"] = ByProgress(self.run_config.failure_config, saved=self.saved)
        if self.scaling_config.elasticity_enabled:
            arguments["scaling_policy"] = EqualShares(self.scaling_config, self.worker_counts)
        return super()._initialize_and_run_controller(**arguments)
