"""Laws of the order: a pure function of (set, seed, position); each epoch serves each sample exactly once."""

from collections import Counter
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components.data.crews import count_crews
from components.data.order import WINDOW_SHARDS, permutation, pick, windows
from components.data.shards import ShardIndex
from components.data.stream import Layout, plan_chunks, read_chunk
from components.runtime.storage.store import Store
from tests.image_sets import number_of, write_set

RUNS = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]  # (seed, epoch)
COUNTS = st.lists(st.integers(0, 9), min_size=1, max_size=8).filter(any)


def served(counts: list[int], seed: int, first: int, last: int) -> list[tuple[int, int]]:
    """(shard, sample) of the positions [first, last)."""
    found = []
    for window in windows(counts, seed=seed, start=first):
        if window.start >= last:
            return found
        chosen = pick(window, seed=seed, first=first, last=last)
        found += [(window.shards[place], int(n)) for place, n in zip(chosen.places, chosen.ordinals, strict=True)]
    raise AssertionError("the stream has no end")


@given(counts=COUNTS, seed=st.integers(0, 2**31), epoch=st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_each_epoch_serves_each_sample_exactly_once(counts: list[int], seed: int, epoch: int) -> None:
    total = sum(counts)
    epoch_served = Counter(served(counts, seed, epoch * total, (epoch + 1) * total))
    assert epoch_served == Counter((shard, n) for shard, count in enumerate(counts) for n in range(count))


@given(counts=COUNTS, seed=st.integers(0, 2**31), first=st.integers(0, 90), length=st.integers(1, 60))
@settings(max_examples=60, deadline=None)
def test_any_part_of_the_stream_is_computed_without_what_came_before(
    counts: list[int], seed: int, first: int, length: int
) -> None:
    assert served(counts, seed, first, first + length) == served(counts, seed, 0, first + length)[first:]


def test_each_epoch_and_each_seed_shuffles_shards_and_samples_anew() -> None:
    shards = [[w.shards for w in islice(windows([1] * 9, seed=seed, start=9 * epoch), 3)] for seed, epoch in RUNS]
    assert len(set(map(tuple, shards))) == len(RUNS)
    orders = [tuple(served([40], seed, 40 * epoch, 40 * epoch + 40)) for seed, epoch in RUNS]
    assert len(set(orders)) == len(RUNS)


def test_samples_are_mixed_over_the_shards_of_a_window_and_no_further() -> None:
    counts = [100] * 9
    shards = [shard for shard, _ in served(counts, 3, 0, 900)]
    for start in range(0, 900, 300):
        assert len(set(shards[start : start + 300])) == WINDOW_SHARDS
    assert len(set(shards[:50])) == WINDOW_SHARDS


def test_a_permutation_is_frozen_for_all_time_and_windows_go_on_for_ever() -> None:
    """numpy may change its shuffles between versions; a resumed run must not notice."""
    assert permutation(10, key=(3, 1)).tolist() == [5, 8, 9, 6, 3, 7, 0, 1, 2, 4]
    last = list(islice(windows([5, 5], seed=0, start=0), 50))[-1]
    assert (last.epoch, last.start) == (49, 490)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    return write_set(Store(str(tmp_path_factory.mktemp("set"))), sizes=(50, 40, 60, 30, 20))


def stream(index: ShardIndex, *, world_size: int, start_step: int = 0, total_steps: int = 120) -> list[dict]:
    """Global batches put together from the blocks that ranks would receive."""
    layout = Layout(8, 16, world_size, 3, index.text.text_length)
    share, ranks, crews = 16 // world_size, [[] for _ in range(world_size)], count_crews(world_size)
    size, rows = world_size // crews, layout.group_rows // world_size
    for chunk in plan_chunks(index, layout, start_step=start_step, total_steps=total_steps):
        for number, block in enumerate(read_chunk(index.model_copy(update={"shards": ()}), layout, chunk)):
            for place in range(size):
                own = block.slice(place * rows, rows)
                columns = {name: own[name].to_numpy() for name in ("label", "position")}
                images = np.stack(own["image"].to_pylist())
                ranks[number % crews * size + place].append(columns | {"image": images})
    steps = []
    for step in range(total_steps - start_step):
        rows = slice(step * share, (step + 1) * share)
        joined = [{name: np.concatenate([b[name] for b in blocks])[rows] for name in blocks[0]} for blocks in ranks]
        steps.append({name: np.concatenate([rank[name] for rank in joined]) for name in joined[0]})
    return steps


def equal(first: list[dict], second: list[dict]) -> bool:
    return len(first) == len(second) and all(
        np.array_equal(a[name], b[name]) for a, b in zip(first, second, strict=True) for name in a
    )


@pytest.fixture(scope="module")
def whole(index: ShardIndex) -> list[dict]:
    return stream(index, world_size=1)


def test_the_global_batches_are_the_same_for_any_number_of_ranks(index: ShardIndex, whole: list) -> None:
    for world_size in (2, 4, 16):
        assert equal(whole, stream(index, world_size=world_size))


@pytest.mark.parametrize("start_step", [1, 31, 32, 33, 119])
def test_a_stream_that_starts_at_a_step_is_the_tail_of_the_whole_one(index: ShardIndex, whole: list, start_step: int):
    for world_size in (2, 16):
        assert equal(whole[start_step:], stream(index, world_size=world_size, start_step=start_step))


def test_positions_count_through_and_images_are_those_of_the_law(index: ShardIndex, whole: list) -> None:
    positions = np.concatenate([batch["position"] for batch in whole])
    numbers = np.concatenate([number_of(batch["image"]) for batch in whole])
    labels = np.concatenate([batch["label"] for batch in whole])
    np.testing.assert_array_equal(positions, np.arange(120 * 16))
    np.testing.assert_array_equal(labels, numbers % 3)
    epoch = index.train_samples
    for start in range(0, len(numbers) - epoch, epoch):
        assert len(set(numbers[start : start + epoch])) == epoch


def test_the_first_chunk_is_small_no_chunk_is_empty_and_huge_images_are_read_a_batch_at_a_time(index: ShardIndex):
    layout = Layout(8, 16, 1, 0, 8)
    chunks = list(plan_chunks(index, layout, start_step=5, total_steps=500))
    assert chunks[0].last - chunks[0].first == layout.group_rows
    assert all(chunk.first < chunk.last for chunk in chunks)
    assert [chunk.first for chunk in chunks[1:]] == [chunk.last for chunk in chunks[:-1]]
    assert chunks[-1].last >= 500 * 16
    huge = Layout(1024, 64, 2, 0, 8)
    assert (huge.steps_per_group, huge.chunk_rows) == (1, 64)
