"""Reports of a training worker: progress about once a second, metrics every log_every steps, images.

Training is saved by steps or by the clock of rank 0; votes of the clock travel with the metrics.
"""

import math
import time
from collections.abc import Iterator

import torch
from torch import Tensor

from components.configuration.optimization import OptimizationConfig
from components.models.devices import ToldLater
from components.runtime import events
from components.training.loop import Arrays, Batch, Metrics, Task, is_scheduled
from components.training.optim import learning_rate
from components.training.parallel import Worker, average_metrics
from components.training.speed import gpu_utilization, speed_measures, system_metrics

PROGRESS_INTERVAL = 1.0  # seconds
DUE = "checkpoint_due"  # among the metrics that ranks average


class CheckpointClock:
    """Decides when to save: by the recipe's steps or, with `checkpoint_minutes`, by the clock of rank 0.

    The clock's vote goes with the metrics that ranks average at every `log_every` steps, so it costs no collective and
    no wait of its own, and every rank saves at the same step. Snapshots of a power EMA, which are part of the model,
    come by steps all the same.
    """

    def __init__(self, config: OptimizationConfig, worker: Worker) -> None:
        self.config, self.worker = config, worker
        self.seconds = None if config.checkpoint_minutes is None else 60 * config.checkpoint_minutes
        self.restart()

    def restart(self) -> None:
        """Count from now: training has begun, or was saved."""
        self.began, self.agreed = time.monotonic(), False

    def vote(self) -> Metrics:
        """The rank's addition to the metrics before averaging; empty where steps decide."""
        if self.seconds is None:
            return {}
        passed = self.worker.rank == 0 and time.monotonic() - self.began >= self.seconds
        return {DUE: torch.full((), float(passed), device=self.worker.device)}

    def hear(self, averages: dict[str, float]) -> None:
        """Take the votes of all ranks out of the averages."""
        self.agreed = averages.pop(DUE, 0.0) > 0

    def is_due(self, step: int) -> bool:
        """True if training is saved after `step`; the same on all ranks."""
        if self.seconds is None or self.config.ema == "power":
            return self.agreed or is_scheduled(step, self.config)
        return self.agreed or step == self.config.total_steps


class Reporter:
    """Rank 0 reports; the other ranks take part where numbers are averaged."""

    def __init__(
        self,
        config: OptimizationConfig,
        *,
        stage: str,
        worker: Worker,
        recorder: events.Recorder,
        start_step: int,
        step_flops: float | None = None,
    ) -> None:
        """`step_flops`: FLOPs of a step of all ranks, forward and backward; None: unknown."""
        self.config, self.stage, self.worker, self.recorder = config, stage, worker, recorder
        self.start_step, self.step_flops = start_step, step_flops
        self.started = self.logged_at = self.progress_at = time.monotonic()
        self.logged_step = self.progress_step = start_step
        self.coming: ToldLater | None = None  # a loss in transfer from the device
        self.loss = math.nan  # the last one that arrived
        self.waited = 0.0  # seconds spent waiting for data since the last log
        self.clock = CheckpointClock(config, worker)
        self.held_seconds = 0.0  # seconds that checkpoints held training since the last log
        self.copy_seconds = 0.0  # of these, to copy states to the host
        self.held_before = 0.0  # seconds that checkpoints held training before the last log
        self.utilization: list[float] = []  # of the GPU since the last log

    def timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches; counts the time that training waits for each."""
        while True:
            before = time.monotonic()
            batch = next(batches, None)
            self.waited += time.monotonic() - before
            if batch is None:
                return
            yield batch

    def log(self, step: int, metrics: Metrics) -> None:
        """Called at every step by every rank."""
        last = step == self.config.total_steps
        if step % self.config.log_every == 0 or last:
            values = average_metrics(metrics | self.clock.vote(), self.worker)
            self.clock.hear(values)
            if self.worker.rank == 0:
                values |= self.speed(step) | system_metrics()
                self.recorder.emit(events.Metrics(self.stage, step, values))
        if self.worker.rank == 0 and (last or time.monotonic() - self.progress_at >= PROGRESS_INTERVAL):
            self.progress(step, self.latest(metrics["loss"]))

    def latest(self, loss: Tensor) -> float:
        """The loss of the step on a CPU; elsewhere the last loss that arrived, without a wait for the device."""
        if loss.device.type == "cpu":
            return float(loss)
        if self.coming is not None and self.coming.has_arrived:
            self.loss = float(self.coming.read())
        if self.coming is None or self.coming.has_arrived:
            self.coming = ToldLater(loss)
        return self.loss

    def progress(self, step: int, loss: float) -> None:
        """Report steps, steps/s and the loss, and sample the GPU's utilization."""
        now = time.monotonic()
        rate = (step - self.progress_step) / max(now - self.progress_at, 1e-9)
        self.recorder.emit(events.Progress(self.stage, step, self.config.total_steps, rate=rate, loss=loss))
        self.progress_at, self.progress_step = now, step
        self.utilization += gpu_utilization(self.worker.device)

    def speed(self, step: int) -> dict[str, float]:
        """Learning rate, samples/s, waits, and holds by checkpoints since the last log; resets the counts."""
        now = time.monotonic()
        seconds, steps, size = max(now - self.logged_at, 1e-9), step - self.logged_step, self.config.global_batch_size
        taken = {"samples": steps * size, "steps": steps, "seconds": seconds, "step_flops": self.step_flops}
        values = {
            "learning_rate": learning_rate(self.config, step),
            "samples_seen": float(step * size),
            **speed_measures(self.worker, **taken, utilization=self.utilization),
            "data_wait_fraction": self.waited / seconds,
        }
        if self.held_seconds:
            values |= {"checkpoint_hold_seconds": self.held_seconds, "checkpoint_copy_seconds": self.copy_seconds}
        self.logged_at, self.logged_step, self.waited, self.utilization = now, step, 0.0, []
        self.held_before += self.held_seconds
        self.held_seconds = self.copy_seconds = 0.0
        return values

    def show(self, task: Task, held_out: Arrays, step: int) -> dict[str, bytes]:
        """Make and report previews: by rank 0, or by all ranks where weights are in shards.

        Returns the images by name, as PNG.
        """
        images = task.preview(held_out, step)
        for name, png in images.items() if self.worker.rank == 0 else ():
            self.recorder.emit(events.Image(self.stage, step, name, png))
        return images

    def summary(self, seconds_before: float, step: int) -> dict[str, float]:
        """Steps, seconds in all tries, samples/s, and seconds that checkpoints held training in this try.

        Samples/s are of this try, or of all tries if it took no step. The last checkpoint comes after all logs, so its
        hold is reported only here.
        """
        seconds, steps = time.monotonic() - self.started, step - self.start_step
        if not steps:
            seconds, steps = 0.0, step
        rate = steps * self.config.global_batch_size / max(seconds or seconds_before, 1e-9)
        return {
            "steps": float(step),
            "train_seconds": round(seconds_before + seconds, 2),
            "samples_per_second": round(rate, 2),
            "checkpoint_hold_seconds": round(self.held_before + self.held_seconds, 2),
        }
