"""Laws of dealing: no rank waits for it, however many there are, and each reads its own rows, in order."""

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from components.data import crews
from components.data.crews import CrewDealer, count_crews, crew_rows, fewest_steps
from components.data.stream import GROUP_BYTES, Layout
from tests.dealing import Dealing

RANKS = [1, 2, 4, 8, 12, 16, 32, 64, 96, 128, 256, 512, 1024]
COSTS = {"block_seconds": crews.BLOCK_SECONDS, "hand_seconds": crews.HAND_SECONDS}


def dealing(world_size: int) -> Dealing:
    """As it is built, in the worst case: the global batch is so large that blocks hold no more steps than they must."""
    layout = Layout(256, 4 * world_size, world_size, 0, 64)
    steps = max(fewest_steps(world_size), GROUP_BYTES // layout.row_bytes // layout.global_batch_size)
    assert layout.steps_per_group == steps
    return Dealing(world_size, count_crews(world_size), steps, **COSTS)


@pytest.mark.parametrize("world_size", RANKS)
def test_ranks_in_lockstep_never_wait_for_steps_of_ten_milliseconds(world_size: int) -> None:
    """And 64 ranks with a block of 2.8 ms for each and step would wait, as was measured."""
    assert dealing(world_size).seconds_a_step(0.01) == pytest.approx(0.01)
    measured = Dealing(64, 64, 1, block_seconds=2.8e-3, hand_seconds=0).seconds_a_step(0.01)
    assert measured == pytest.approx(0.179, rel=0.01)


def test_a_group_grows_slowly_with_the_ranks() -> None:
    """A reading task holds one: 160 steps of 512 ranks at 256² would be 64 GB."""
    assert [fewest_steps(n) for n in (1, 2, 4, 8, 16, 64, 128, 512, 1024)] == [1, 1, 2, 3, 3, 3, 5, 5, 5]


@pytest.mark.parametrize("world_size", RANKS)
def test_up_to_eight_ranks_and_from_there_to_128_a_crew_is_a_rank_or_at_most_a_node(world_size: int) -> None:
    size = world_size // count_crews(world_size)
    assert size * count_crews(world_size) == world_size
    assert size == 1 if world_size <= 8 else size <= max(8, world_size / 16)


@pytest.mark.parametrize("world_size", [1, 4, 12, 64, 512])
def test_the_rows_of_crews_are_those_of_their_ranks_step_by_step(world_size: int) -> None:
    steps, share = 3, 2
    positions = np.arange(steps * world_size * share)
    number = count_crews(world_size)
    dealt = [crew_rows(positions, crew=crew, world_size=world_size, steps=steps) for crew in range(number)]
    ranks = np.concatenate([block.reshape(world_size // number, steps, share) for block in dealt])
    for step in range(steps):
        np.testing.assert_array_equal(ranks[:, step].ravel(), positions.reshape(steps, -1)[step])


class Blocks:
    """What a dealer iterates: as many blocks as it is told, then an error if there is one."""

    def __init__(self, count: int, error: Exception | None = None) -> None:
        self.count, self.error, self.taken, self.ended = count, error, 0, 0

    def _to_ref_bundle_iterator(self) -> tuple[Iterator[Any], None, None]:
        def blocks() -> Iterator[int]:
            for number in range(self.count):
                self.taken += 1
                yield number
            if self.error is not None:
                raise self.error

        return blocks(), None, None

    def _on_iteration_end(self, executor: None) -> None:
        self.ended += 1


def take_all(dealer: Any, place: int, found: list[Any]) -> None:
    epoch = dealer.start_epoch(place)
    try:
        while (block := dealer.get(epoch, place)) is not None:
            found.append(block)
    except ValueError as error:
        found.append(error)
    dealer.notify_split_finished(epoch, place)


@pytest.mark.parametrize("error", [None, ValueError("a shard is damaged")])
def test_every_rank_of_a_crew_gets_every_block_once_in_order_and_what_was_raised(error: Exception | None) -> None:
    blocks: Any = Blocks(50, error)
    dealer, found = CrewDealer(blocks, 5), [[] for _ in range(5)]
    threads = [threading.Thread(target=take_all, args=(dealer, place, found[place])) for place in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [[*range(50), *([error] if error else [])]] * 5
    assert (blocks.taken, blocks.ended) == (50, 1)


def test_a_rank_that_stands_still_holds_the_dealer_so_that_memory_is_bounded() -> None:
    blocks: Any = Blocks(50)
    dealer = CrewDealer(blocks, 2)
    dealer.start_epoch(0)
    assert [dealer.get(0, 0), dealer.get(0, 0)] == [0, 1]
    dealer.dealing.join(0.2)
    assert dealer.dealing.is_alive()
    assert blocks.taken == 1 + crews.AHEAD_BLOCKS
