"""Laws of the pool of workers: none waits for another, none is missed when it is lost, none gathers parts in memory.

The parts wait for each other's files, so what would let a worker wait for another's part ends in an error, not slowly.
"""

import os
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import RayActorError

from components.runtime.execution import Resources
from components.runtime.pool import IN_HAND, Later, Pool
from components.runtime.storage.store import Store
from tests.waiting import eventually

SECONDS = 120  # to wait for what must come
TWO = Resources(num_actors=2, cpus_per_worker=0.1)
ONE = TWO.replace(num_actors=1)
LARGE = 0.6  # of all logical CPUs: there is room for one such worker


@pytest.fixture
def place(ray_cluster: None, tmp_path: Path) -> Store:
    return Store(str(tmp_path))


def after_all_others(place: Store, total: int) -> Callable[[int], int]:
    """A part 0 that ends when all others have."""

    def work(part: int) -> int:
        if part == 0:
            assert eventually(lambda: len(place.list()) == total - 1, SECONDS)
        else:
            place.write(str(part), b"")
        return 10 * part

    return work


def test_a_long_part_keeps_no_other_worker_waiting_and_results_have_the_order_of_the_parts(place: Store) -> None:
    with Pool(TWO) as pool:
        assert list(pool.map(partial(after_all_others, place, 9), range(9))) == [10 * part for part in range(9)]


def dies_at(place: Store, deadly: int, times: int) -> Callable[[int], tuple[int, int]]:
    """A worker that is killed in a part, the first times; returns the part and its process."""

    def work(part: int) -> tuple[int, int]:
        place.write(f"{part}-{time.monotonic_ns()}", b"")
        tries = sum(info.path.startswith(f"{part}-") for info in place.list())
        if part == deadly and tries <= times:
            os.kill(os.getpid(), signal.SIGKILL)
        return part, os.getpid()

    return work


@pytest.mark.parametrize("resources", [ONE, TWO])
def test_the_part_of_a_lost_worker_is_done_again_by_another(place: Store, resources: Resources) -> None:
    with Pool(resources) as pool:
        made = list(pool.map(partial(dies_at, place, 3, 2), range(8)))
    assert [part for part, _ in made] == list(range(8))
    begun = [int(info.path.split("-")[0]) for info in place.list()]
    assert begun.count(3) == 3
    assert len(begun) <= 8 + 2 * IN_HAND


def test_a_part_that_costs_too_many_workers_ends_the_work(place: Store) -> None:
    with Pool(ONE.replace(max_failures=1)) as pool, pytest.raises(RayActorError):
        list(pool.map(partial(dies_at, place, 0, 99), [0]))
    assert len(place.list()) == 2


def test_an_error_of_a_part_is_told_as_it_is_and_costs_no_worker(place: Store) -> None:
    with Pool(ONE) as pool:
        with pytest.raises(ZeroDivisionError):
            list(pool.map(partial(inverse, place), [1, 0, 2]))
        assert pool.call(os.getpid) == next(iter(pool.map(process, [0])))


def inverse(place: Store) -> Callable[[int], float]:
    return lambda part: 1 / part


def process() -> Callable[[int], int]:
    return lambda part: os.getpid()


def test_a_worker_without_a_place_keeps_no_part_from_the_others(place: Store) -> None:
    import ray

    cpus = ray.cluster_resources()["CPU"]
    with Pool(TWO.replace(cpus_per_worker=round(LARGE * cpus, 2))) as pool:
        made = list(pool.map(process, range(4)))
        assert len(pool.starting) == 1
    assert len(set(made)) == 1


class InTurn:
    """Its parts are finished only once the next one has begun; it counts those that it holds."""

    def __init__(self, waiting: int) -> None:
        self.waiting = waiting  # so many of the first parts wait
        self.begun = [threading.Event() for _ in range(waiting + 1)]
        self.lock, self.held, self.most = threading.Lock(), 0, 0

    def __call__(self, part: int) -> Later:
        with self.lock:
            self.held += 1
            self.most = max(self.most, self.held)
        if part <= self.waiting:
            self.begun[part].set()
        return Later(partial(self.finish, part))

    def finish(self, part: int) -> Any:
        if part < self.waiting:
            assert self.begun[part + 1].wait(SECONDS), "the next part did not begin"
        with self.lock:
            self.held -= 1
        return part, self.most


def test_the_next_part_begins_before_the_last_one_is_written_and_no_third_is_held(ray_cluster: None) -> None:
    with Pool(ONE) as pool:
        made = list(pool.map(partial(InTurn, 4), range(8)))
    assert [part for part, _ in made] == list(range(8))
    assert max(most for _, most in made) == IN_HAND
