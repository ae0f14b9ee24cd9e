"""The training loop, and the interface of tasks: the loop decides when, the task how."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from components.configuration.optimization import OptimizationConfig

Batch = dict[str, Tensor]
Arrays = dict[str, np.ndarray]
Metrics = dict[str, Tensor]


class Task(Protocol):
    """A model in training: networks, optimizers, EMA, and the training step."""

    max_batch: int | None  # samples at a time, set before `fit`; None: the rank's whole share
    parts_matter: bool  # True if a batch taken in parts trains another model

    def train_step(self, batch: Batch, step: int) -> Metrics:
        """Take the training step `step` (1-based). Returns scalar tensors on the device, `loss` among them."""

    def state_dict(self) -> dict[str, Any]:
        """The whole state: {"weights": flat name -> tensor, ...plain values and optimizer states}."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a `state_dict`, bit for bit, also after a step that broke off halfway."""

    def evaluate(self, held_out: Arrays) -> dict[str, float]:
        """Summary metrics of the finished (EMA) model on held-out data; no effect on training."""

    def preview(self, held_out: Arrays, step: int) -> dict[str, bytes]:
        """Images of the (EMA) model by name, as PNG; draws from separate generators."""


def fit(
    task: Task,
    batches: Iterator[Batch],
    config: OptimizationConfig,
    *,
    start_step: int = 0,
    log: Callable[[int, Metrics], None] = lambda step, metrics: None,
    save: Callable[[int, Task], None] = lambda step, task: None,
    show: Callable[[int, Task], object] = lambda step, task: None,
    leave: Callable[[], bool] = lambda: False,
    due: Callable[[int], bool] | None = None,
) -> int:
    """Train from `start_step` (steps already taken) to `total_steps`. Returns the steps taken.
    `batches` start at `start_step` too. `log` and `leave` are called at every step, `save` and `show` at intervals:
    first `save`, so that a failing preview loses nothing. The last step is saved and not shown. `due` decides whether a
    step is saved; None: `is_scheduled`. If `leave` is true, the state is saved and training ends."""
    step, due = start_step, due or partial(is_scheduled, config=config)
    for step in range(start_step + 1, config.total_steps + 1):
        metrics = task.train_step(next(batches), step)
        log(step, metrics)
        leaving = leave()
        if due(step) or leaving:
            save(step, task)
        if leaving:
            break
        if step % config.sample_every == 0 and step < config.total_steps:
            show(step, task)
    return step


def is_scheduled(step: int, config: OptimizationConfig) -> bool:
    """True if the recipe schedules a checkpoint, or a snapshot of a power EMA, after `step`."""
    return step % config.checkpoint_every == 0 or step == config.total_steps
