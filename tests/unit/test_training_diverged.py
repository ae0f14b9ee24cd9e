"""Laws of a training whose loss stays finite and far above what it was: it stops, and its good checkpoint stays."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from components.configuration.optimization import GANOptimization, OptimizationConfig
from components.training.loop import fit
from components.training.optim import DivergedError, LossWatch
from components.training.parallel import ALONE
from components.training.reporting import Reporter
from tests.distributed.recording import FileRecorder


def config(**changes: object) -> OptimizationConfig:
    numbers = {
        "total_steps": 200,
        "global_batch_size": 8,
        "learning_rate": 1e-3,
        "log_every": 2,
        "checkpoint_every": 10,
    }
    return OptimizationConfig(**(numbers | changes))


def test_a_diverged_training_stops_in_a_line_and_keeps_the_checkpoint_of_before(tmp_path: Path) -> None:
    saved: list[int] = []
    reporter = Reporter(
        config(), stage="base", worker=ALONE, recorder=FileRecorder(tmp_path / "log.jsonl"), start_step=0
    )
    losses = SimpleNamespace(train_step=lambda batch, step: {"loss": torch.tensor(0.5 if step < 50 else 40.0)})
    with pytest.raises(DivergedError) as caught:
        fit(
            losses,
            iter(lambda: {}, None),
            config(),
            log=reporter.log,
            save=lambda step, task: saved.append(step),
            due=reporter.is_due,
        )
    assert saved == [10, 20, 30, 40]
    line = str(caught.value)
    assert "\n" not in line
    for said in ("loss 40 at step 58", "median 0.5, 5 logs in a row", "try a lower learning_rate", "max_loss_factor"):
        assert said in line


@pytest.mark.parametrize(
    "curve",
    [
        [1.0] * 20 + [100.0] * 4 + [1.0] * 20,  # a spike from which the training comes back
        [100.0 * 0.9**step for step in range(200)],
        [3.0 - 0.05 * step for step in range(200)],  # a likelihood that goes through zero
        [0.01 * math.sin(step) for step in range(200)],
        [0.1 + 0.002 * step for step in range(1000)],  # slow growth: the median follows
        [5.0, 500.0, 500.0, 500.0, 500.0, 500.0, 500.0],  # too young to have a median
    ],
)
def test_no_curve_of_a_training_that_goes_on_is_stopped(curve: list[float]) -> None:
    watch = LossWatch(config())
    for step, loss in enumerate(curve):
        watch.add({"loss": loss}, step=step)


def test_numbers_of_the_recipe_decide_and_a_contest_or_a_sum_with_it_is_not_judged() -> None:
    contest = GANOptimization(
        total_steps=100, global_batch_size=8, learning_rate=1e-3, discriminator_learning_rate=1e-3
    )
    curve, watched = [0.1] * 20 + [1.0] * 3, LossWatch(contest)
    for loss in curve * 3:
        watched.add({"loss": 100 * loss}, step=0)
    watched = LossWatch(config(max_loss_factor=5, max_loss_logs=3))
    for loss in curve[:-1]:
        watched.add({"loss": -loss, "reconstruction_loss": loss}, step=1)
    with pytest.raises(DivergedError, match=r"reconstruction_loss 1 at step 2 .* from 5"):
        watched.add({"loss": -1.0, "reconstruction_loss": 1.0}, step=2)
