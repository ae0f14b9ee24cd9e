"""What one worker tells while it trains: progress about once a second, metrics every log_every steps, images."""

import math
import time
from collections.abc import Iterator

from torch import Tensor

from components.configuration.optimization import OptimizationConfig
from components.models.transfer import ToldLater
from components.runtime import events
from components.training.clock import CheckpointClock
from components.training.loop import Arrays, Batch, Metrics, Task
from components.training.optim import learning_rate
from components.training.parallel import Worker, average_metrics
from components.training.speed import gpu_utilization, speed_measures
from components.training.system_metrics import system_metrics

PROGRESS_INTERVAL = 1.0  # seconds


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
        """`step_flops`: FLOPs of one step of all ranks, forward and backward; None: not known."""
        self.config, self.stage, self.worker, self.recorder = config, stage, worker, recorder
        self.start_step, self.step_flops = start_step, step_flops
        self.started = self.logged_at = self.progress_at = time.monotonic()
        self.logged_step = self.progress_step = start_step
        self.told: ToldLater | None = None  # a loss that is on its way from the device
        self.known = math.nan
        self.waited = 0.0  # seconds spent waiting for data since the last log
        self.clock = CheckpointClock(config, worker)
        self.held_seconds = self.copy_seconds = 0.0  # that checkpoints held training since then; to copy states of it
        self.held_before = 0.0  # that they held it before the last log
        self.utilization: list[float] = []  # of the GPU since the last log

    def timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches, with the time that training waits for them counted."""
        while True:
            asked = time.monotonic()
            batch = next(batches, None)
            self.waited += time.monotonic() - asked
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
        """The loss of this step on a CPU; elsewhere the last one that is known without waiting for the device."""
        if loss.device.type == "cpu":
            return float(loss)
        if self.told is not None and self.told.has_arrived:
            self.known = float(self.told.read())
        if self.told is None or self.told.has_arrived:
            self.told = ToldLater(loss)
        return self.known

    def progress(self, step: int, loss: float) -> None:
        now = time.monotonic()
        rate = (step - self.progress_step) / max(now - self.progress_at, 1e-9)
        self.recorder.emit(events.Progress(self.stage, step, self.config.total_steps, rate=rate, loss=loss))
        self.progress_at, self.progress_step = now, step
        self.utilization += gpu_utilization(self.worker.device)

    def speed(self, step: int) -> dict[str, float]:
        """Learning rate, samples/s, waits and what checkpoints held since the last log, which begins anew."""
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
        """Rank 0 shows what the model makes now. Returns the images; where weights are in shards all make them."""
        images = task.preview(held_out, step)
        for name, png in images.items() if self.worker.rank == 0 else ():
            self.recorder.emit(events.Image(self.stage, step, name, png))
        return images

    def summary(self, seconds_before: float, step: int) -> dict[str, float]:
        """Steps, seconds of training in all tries, and samples/s: of this try, or of all if it took no step.

        And the seconds that checkpoints held training in this try: the last one comes after all logs.
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
