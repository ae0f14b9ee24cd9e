"""Laws of the pace by which the time to go of a stage of images is told."""

import pytest

from components.stages.context import Pace


def test_the_pace_is_that_of_what_is_done_and_not_of_what_was_found() -> None:
    pace = Pace()
    assert [pace.rate(64 * count, now=10 + 0.001 * count) for count in range(1, 9)] == [None] * 8
    assert pace.rate(576, now=20.008) == pytest.approx(6.4)
    assert pace.rate(640, now=30.008) == pytest.approx(6.4)


def test_other_work_begins_with_a_pace_of_its_own() -> None:
    pace = Pace()
    for count in range(5):
        pace.rate(100 * count, now=count)
    assert pace.rate(10, now=10) is None
    assert pace.rate(20, now=11) == 10


def test_the_pace_follows_what_is_done_now() -> None:
    pace = Pace()
    for second in range(100):
        pace.rate(second, now=second)
    for second in range(100, 200):
        last = pace.rate(100 + 10 * (second - 100), now=second)
    assert last == pytest.approx(10)
