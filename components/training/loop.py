"""The loop knows when, the task knows how."""

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
    """One trained model: its networks, optimizers, EMA, and the step that moves them."""

    max_batch: int | None  # samples that it takes at a time, set before `fit`; None: its whole share of a batch
    parts_matter: bool  # whether a batch that is taken in parts trains another model

    def train_step(self, batch: Batch, step: int) -> Metrics:
        """Move the weights by one step (1-based). Returns scalar tensors on the device, `loss` among them."""

    def state_dict(self) -> dict[str, Any]:
        """All that the next step depends on: {"weights": flat name -> tensor, ...plain values and optimizer states}."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Be as another task was when it gave `state`, bit for bit, also after a step that broke off halfway."""

    def evaluate(self, held_out: Arrays) -> dict[str, float]:
        """Summary metrics of the finished (EMA) model on held-out data; touches nothing that training depends on."""

    def preview(self, held_out: Arrays, step: int) -> dict[str, bytes]:
        """Name -> PNG of what the (EMA) model makes now; draws from generators of its own."""


def fit(
    task: Task,
    batches: Iterator[Batch],
    config: OptimizationConfig,
    *,
    start_step: int = 0,
    log: Callable[[int, Metrics], None] = lambda step, metrics: None,
    save: Callable[[int, Task], None] = lambda step, task: None,
    show: Callable[[int, Task], None] = lambda step, task: None,
    leave: Callable[[], bool] = lambda: False,
    due: Callable[[int], bool] | None = None,
) -> int:
    """Train from `start_step` (steps already taken) to `config.total_steps`; `batches` must start there too.

    `log` is called at every step and decides what to read, `save` and `show` at their intervals: first `save`, so that
    nothing is lost by what is shown. The last step is saved and not shown: the caller shows and evaluates the finished
    model. `due` says whether a step is saved; None: `is_scheduled`. `leave` is asked after every step: if it says so,
    the state is saved and training ends. Returns the steps taken.
    """
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
    """Whether the recipe wants a checkpoint, or a snapshot of a power EMA, after this step by its number."""
    return step % config.checkpoint_every == 0 or step == config.total_steps
