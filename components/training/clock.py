"""When a training is saved that counts minutes: the clock of rank 0 says so, and all ranks hear of it at one step."""

import time

import torch

from components.configuration.optimization import OptimizationConfig
from components.training.loop import Metrics, is_scheduled
from components.training.parallel import Worker

DUE = "checkpoint_due"  # among the metrics that ranks average


class CheckpointClock:
    """Says after which steps to save: by the recipe's steps or, where it has `checkpoint_minutes`, by the clock.

    What the clock says goes with the metrics that ranks average at every `log_every` steps, so it costs no collective
    and no wait of its own, and every rank saves at the same step. Snapshots of a power EMA, which are part of the
    model, come by steps all the same.
    """

    def __init__(self, config: OptimizationConfig, worker: Worker) -> None:
        self.config, self.worker = config, worker
        self.seconds = None if config.checkpoint_minutes is None else 60 * config.checkpoint_minutes
        self.restart()

    def restart(self) -> None:
        """Count from now: training begins, or was saved."""
        self.began, self.agreed = time.monotonic(), False

    def vote(self) -> Metrics:
        """What this rank adds to the metrics before they are averaged; nothing where steps decide."""
        if self.seconds is None:
            return {}
        passed = self.worker.rank == 0 and time.monotonic() - self.began >= self.seconds
        return {DUE: torch.full((), float(passed), device=self.worker.device)}

    def hear(self, averages: dict[str, float]) -> None:
        """Take what all ranks said out of the averages."""
        self.agreed = averages.pop(DUE, 0.0) > 0

    def is_due(self, step: int) -> bool:
        """Whether training is saved after this step; the same on all ranks."""
        if self.seconds is None or self.config.ema == "power":
            return self.agreed or is_scheduled(step, self.config)
        return self.agreed or step == self.config.total_steps
