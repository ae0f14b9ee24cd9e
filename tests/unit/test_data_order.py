"""Laws of the order: a pure function of (set, seed, streams, position); each epoch serves each sample exactly once."""

import tracemalloc
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components.data.order import Order, permutation

RUNS = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]  # (seed, epoch)
COUNTS = st.lists(st.integers(0, 9), min_size=1, max_size=11).filter(any)
STREAMS = st.sampled_from([1, 12, 24, 48])
WORLD_SIZES = (1, 2, 3, 4, 6, 8, 12, 16)


def served(counts: list[int], seed: int, first: int, last: int, streams: int = 12) -> list[tuple[int, int]]:
    """(shard, sample) of the positions [first, last)."""
    places = Order(counts, seed=seed, streams=streams).locate(np.arange(first, last))
    return list(zip(places.shards.tolist(), places.ordinals.tolist(), strict=True))


@given(counts=COUNTS, seed=st.integers(0, 2**31), epoch=st.integers(0, 5), streams=STREAMS)
@settings(max_examples=60, deadline=None)
def test_each_epoch_serves_each_sample_exactly_once(counts: list[int], seed: int, epoch: int, streams: int) -> None:
    total = sum(counts)
    epoch_served = Counter(served(counts, seed, epoch * total, (epoch + 1) * total, streams))
    assert epoch_served == Counter((shard, n) for shard, count in enumerate(counts) for n in range(count))


@given(counts=COUNTS, seed=st.integers(0, 2**31), first=st.integers(0, 90), length=st.integers(1, 60))
@settings(max_examples=60, deadline=None)
def test_any_part_of_the_stream_is_computed_without_what_came_before(
    counts: list[int], seed: int, first: int, length: int
) -> None:
    assert served(counts, seed, first, first + length) == served(counts, seed, 0, first + length)[first:]


@given(counts=COUNTS, seed=st.integers(0, 2**31), streams=STREAMS)
@settings(max_examples=60, deadline=None)
def test_a_stream_reads_one_piece_of_the_shuffled_line_shard_after_shard(
    counts: list[int], seed: int, streams: int
) -> None:
    """Written down without the arithmetic of the product: the samples of the streams, sorted along the line."""
    total, line = sum(counts), permutation(len(counts), key=(seed, 0)).tolist()
    place = {shard: number for number, shard in enumerate(line)}
    pieces = [served(counts, seed, 0, total, streams)[stream::streams] for stream in range(streams)]
    assert {len(piece) for piece in pieces} <= {total // streams, total // streams + 1}
    for piece in pieces:
        visits = [place[shard] for shard, _ in piece]
        assert visits in (sorted(visits), sorted(visits, reverse=True))
        inner = sorted(set(visits))[1:-1]  # shards between the first and the last are read whole
        assert all(visits.count(number) == counts[line[number]] for number in inner)
    ends = sorted((min(visits), max(visits)) for piece in pieces if (visits := [place[s] for s, _ in piece]))
    assert all(last <= first for (_, last), (first, _) in pairwise(ends))


def test_each_epoch_and_each_seed_shuffles_shards_and_samples_anew() -> None:
    for counts in ([1] * 40, [40]):
        total = sum(counts)
        orders = [tuple(served(counts, seed, total * epoch, total * (epoch + 1))) for seed, epoch in RUNS]
        assert len(set(orders)) == len(RUNS)


def test_neighbors_come_from_as_many_shards_as_there_are_streams() -> None:
    """A set whose shards hold a class each mixes so many classes in a batch."""
    shards = [shard for shard, _ in served([100] * 48, 3, 0, 4800, streams=24)]
    assert [len(set(shards[start : start + 24])) for start in range(0, 4800, 24)] == [24] * 200


def test_a_permutation_is_frozen_for_all_time() -> None:
    """numpy may change its shuffles between versions; a resumed run must not notice."""
    assert permutation(10, key=(3, 1)).tolist() == [5, 8, 9, 6, 3, 7, 0, 1, 2, 4]


@pytest.mark.parametrize("counts", [[1000] * 320, [1000] * 20, [90, 110] * 40, [50, 40, 60, 30, 20, 35]])
@pytest.mark.parametrize("streams", [12, 48])
def test_the_bytes_that_ranks_fetch_are_those_of_the_shards_that_their_positions_lie_in(
    counts: list[int], streams: int
) -> None:
    order, sizes = Order(counts, seed=3, streams=streams), [7 * count + 1 for count in counts]
    places = order.locate(np.arange(sum(counts)))
    for world_size in WORLD_SIZES:
        read = [np.unique(places.shards[rank::world_size]) for rank in range(world_size)]
        assert order.fetched(sizes, world_size) == sum(sizes[shard] for shards in read for shard in shards)


def test_320_tars_are_fetched_once_by_sixteen_readers_and_20_tars_less_than_twice() -> None:
    """And a number of ranks that does not divide the streams reads more: 64 ranks, four ranks each of 16 sets."""
    for tars, ranks, limit in ((320, 16, 1.1), (320, 12, 1.2), (20, 16, 1.8), (320, 64, 4.3)):
        counts = [990 + 7 * number % 20 for number in range(tars)]
        order, sizes = Order(counts, seed=0, streams=48), [10**8] * tars
        assert order.fetched(sizes, 1) == sum(sizes)
        assert limit - 0.3 < order.fetched(sizes, ranks) / sum(sizes) <= limit


def test_a_position_of_a_huge_set_is_found_in_megabytes() -> None:
    """100,000 shards and 10⁹ samples, in the middle of a late epoch: nothing is counted up to."""
    counts, batch = [10_000] * 100_000, 4096
    tracemalloc.start()
    order = Order(counts, seed=0, streams=192)
    places = order.locate(np.arange(7 * 10**9 + 5 * 10**8, 7 * 10**9 + 5 * 10**8 + batch))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(set(zip(*(column.tolist() for column in places), strict=True))) == batch
    assert peak < 64 * 2**20
