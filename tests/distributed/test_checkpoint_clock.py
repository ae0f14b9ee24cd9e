"""Checkpoints by minutes and notices that a node goes: both ranks save at one step, and no weight hears of it."""

from pathlib import Path
from typing import Any
from unittest import mock

import torch

from components.runtime import events
from components.training import reporting
from components.training.batches import to_batch
from components.training.loop import Task, fit
from components.training.parallel import Worker, average
from components.training.reporting import Reporter
from tests.distributed.gloo import run_ranks
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
    run_ranks(2, train_rank, tmp_path)
    said = [(tmp_path / str(rank)).read_text() for rank in (0, 1)]
    assert said == ["[7, 14, 21, 24]"] * 2  # after seven seconds, as steps of a minute vote each, and at the end


def leave_rank(worker: Worker, folder: Path) -> None:
    """The node of rank 1 is taken away after seven steps of half a second, and nothing is logged before the end."""
    config = diffusion_config(total_steps=60, checkpoint_every=100, log_every=1000)
    rows, taken, saved = iter(batches(config, to_batch, worker=worker)), [0], []
    clock = mock.Mock(monotonic=lambda: 0.5 * taken[0])

    def counted() -> Any:
        for batch in rows:
            taken[0] += 1
            yield batch

    with mock.patch.object(reporting, "time", clock), mock.patch.object(reporting, "average", wraps=average) as votes:
        reporter = Reporter(
            config.optimization,
            stage="base",
            worker=worker,
            recorder=events.Recorder(),
            start_step=0,
            is_taken_away=lambda: worker.rank == 1 and taken[0] >= 7,
        )
        save, leave = lambda step, task: saved.append(step), lambda: reporter.clock.leaving
        how = {"log": reporter.log, "save": save, "due": reporter.clock.is_due, "leave": leave}
        reached = fit(make_task(config, worker=worker), counted(), config.optimization, **how)
    (folder / f"{worker.rank}").write_text(f"{reached} {saved} {votes.call_count}")


def test_both_ranks_leave_at_one_step_soon_after_a_notice_without_a_vote_at_every_step(tmp_path: Path) -> None:
    """Votes come at the second step, which says how long steps are, and then every five seconds."""
    run_ranks(2, leave_rank, tmp_path)
    assert [(tmp_path / str(rank)).read_text() for rank in (0, 1)] == ["12 [12] 2"] * 2


def test_snapshots_of_a_power_average_come_by_steps_all_the_same() -> None:
    torch.set_num_threads(1)
    steps, _ = saved_at(CONFIG.replace(ema="power", checkpoint_minutes=100.0), Worker())
    assert steps == [5, 10, 15, 20, 24]
