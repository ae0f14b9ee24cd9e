"""Checkpoints by minutes: rank 0's clock decides, both ranks save at one step, and no weight hears of it."""

from pathlib import Path
from typing import Any
from unittest import mock

import torch

from components.runtime import events
from components.training import reporting
from components.training.batches import to_batch
from components.training.loop import Task, fit
from components.training.parallel import Worker
from components.training.reporting import Reporter
from tests.distributed.gloo import run_two_ranks
from tests.tiny_training import assert_equal_bits, batches, diffusion_config, make_task, weights_of

STEPS = 24
CONFIG = diffusion_config(total_steps=STEPS, checkpoint_every=5, log_every=2, checkpoint_minutes=7 / 60)
SECONDS = {0: 1.0, 1: 100.0}  # that a step takes, by the clock of each rank


def saved_at(config: Any, worker: Worker) -> tuple[list[int], Task]:
    """The steps at which a rank saves, whose clock moves at each step, and its task."""
    now, steps = [0.0], []
    task = make_task(config, worker=worker)
    options = {"stage": "base", "worker": worker, "recorder": events.Recorder(), "start_step": 0}

    def save(step: int, task: Task) -> None:
        steps.append(step)
        reporter.clock.restart()

    def rows() -> Any:
        for batch in batches(config, to_batch, worker=worker):
            now[0] += SECONDS[worker.rank]
            yield batch

    with mock.patch.object(reporting, "time", mock.Mock(monotonic=lambda: now[0])):
        reporter = Reporter(config.optimization, **options)
        fit(task, rows(), config.optimization, log=reporter.log, save=save, due=reporter.clock.is_due)
    return steps, task


def train_rank(worker: Worker, folder: Path) -> None:
    steps, task = saved_at(CONFIG, worker)
    (folder / f"{worker.rank}").write_text(str(steps))
    by_steps, other = saved_at(CONFIG.replace(checkpoint_minutes=None), worker)
    assert by_steps == [5, 10, 15, 20, 24]
    assert_equal_bits(weights_of(task), weights_of(other))


def test_both_ranks_save_where_the_clock_of_rank_0_says_and_train_the_same_weights(tmp_path: Path) -> None:
    run_two_ranks(train_rank, tmp_path)
    said = [(tmp_path / str(rank)).read_text() for rank in (0, 1)]
    assert said == ["[8, 16, 24]"] * 2  # seven seconds have passed at the next step that logs, and at the end


def test_snapshots_of_a_power_average_come_by_steps_all_the_same() -> None:
    torch.set_num_threads(1)
    steps, _ = saved_at(CONFIG.replace(ema="power", checkpoint_minutes=100.0), Worker())
    assert steps == [5, 10, 15, 20, 24]
