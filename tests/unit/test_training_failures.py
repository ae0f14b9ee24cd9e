"""The budget of losses: counted between two checkpoints; a store that is away for too long ends a training at once."""

import ray.train

from components.runtime.storage.connection import AwayError
from components.training.launch import ByProgress


def decisions(*saved: int, most: int, why: str = "the node is gone") -> list[str]:
    """What is decided of a loss at each number of saved steps."""
    steps = iter(saved)
    policy = ByProgress(ray.train.FailureConfig(max_failures=most), saved=steps.__next__)
    lost = ray.train.WorkerGroupError(why, {0: RuntimeError(why)})
    return [policy.make_decision(lost).name for _ in saved]


def test_only_losses_without_a_new_checkpoint_count():
    assert decisions(0, 0, 0, 0, most=3) == ["RETRY"] * 3 + ["RAISE"]
    assert decisions(10, 10, 20, 20, 30, 40, 50, most=2) == ["RETRY"] * 7  # of days on spot nodes
    assert decisions(10, 20, 20, 20, most=2) == ["RETRY"] * 3 + ["RAISE"]
    assert decisions(20, 10, 10, most=2) == ["RETRY"] * 2 + ["RAISE"]  # a damaged one was forgotten: no progress
    assert decisions(0, 10, most=0) == ["RAISE"] * 2
    assert decisions(0, 0, 0, most=-1) == ["RETRY"] * 3


def test_a_store_that_was_away_too_long_is_not_waited_for_again():
    why = f"components.runtime.storage.connection.{AwayError.__name__}: s3://bucket/a was away for 15:00: no route"
    assert decisions(10, most=3, why=why) == ["RAISE"]
