"""Laws of planning: the same plan as the naive one, made as it is needed, for sets and runs of any size."""

import tracemalloc
from collections.abc import Iterator, Sequence
from itertools import islice, pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components.data import stream
from components.data.order import WINDOW_SHARDS, ShuffleWindow, permutation, windows
from components.data.shards import ShardEntry, ShardIndex, TextInfo
from components.data.stream import Chunk, Layout, StreamDatasource, plan_chunks, read_chunk
from components.runtime.storage.store import Store
from tests.image_sets import number_of, write_set

MANY_SHARDS, MANY_SAMPLES = 100_000, 10**9
LAYOUT = Layout(64, 1024, 8, 0, 16)
COUNTS = st.lists(st.integers(0, 9), min_size=1, max_size=11).filter(any)


def naive_windows(counts: Sequence[int], *, seed: int, start: int) -> Iterator[ShuffleWindow]:
    """The law as one would write it down: all windows of all epochs from the first one on."""
    epoch, position = 0, 0
    while True:
        order = permutation(len(counts), key=(seed, epoch))
        for number, first in enumerate(range(0, len(order), WINDOW_SHARDS)):
            shards = tuple(int(shard) for shard in order[first : first + WINDOW_SHARDS])
            window = ShuffleWindow(epoch, number, position, shards, tuple(counts[shard] for shard in shards))
            position = window.stop
            if window.stop > window.start and window.stop > start:
                yield window
        epoch += 1


def index_of(counts: Sequence[int]) -> ShardIndex:
    """An index of shards that nobody wrote."""
    shards = tuple(
        ShardEntry(url=f"shard-{n:06d}.tar", bytes=10**8, sha256="0" * 64, samples=count, train_samples=count)
        for n, count in enumerate(counts)
    )
    about = {"source": "none", "license": "none", "resolution": 64, "classes": ("a",), "holdout_fraction": 0}
    about |= {"samples": sum(counts), "train_samples": sum(counts), "quarantined": 0}
    return ShardIndex(**about, text=TextInfo(sha256="", vocab_size=300, text_length=16), shards=shards)


@pytest.fixture(scope="module")
def large() -> ShardIndex:
    return index_of([MANY_SAMPLES // MANY_SHARDS] * MANY_SHARDS)


@given(counts=COUNTS, seed=st.integers(0, 2**31), start=st.integers(0, 300))
@settings(max_examples=100, deadline=None)
def test_windows_are_those_of_the_naive_plan(counts: list[int], seed: int, start: int) -> None:
    ours, naive = (list(islice(make(counts, seed=seed, start=start), 12)) for make in (windows, naive_windows))
    assert ours == naive
    assert all(type(number) is int for window in ours for number in (window.start, *window.shards, *window.counts))


@given(
    counts=st.lists(st.integers(0, 400), min_size=1, max_size=9).filter(any),
    start_step=st.integers(0, 40),
    steps=st.integers(1, 60),
    resolution=st.sampled_from([8, 512]),
)
@settings(max_examples=60, deadline=None)
def test_chunks_cover_the_steps_once_with_the_windows_that_hold_them(
    counts: list[int], start_step: int, steps: int, resolution: int
) -> None:
    layout, index = Layout(resolution, 32, 2, 5, 8), index_of(counts)
    chunks = list(plan_chunks(index, layout, start_step=start_step, total_steps=start_step + steps))
    assert chunks[0].first == start_step * 32
    assert chunks[-1].last >= (start_step + steps) * 32
    assert all(before.last == after.first for before, after in pairwise(chunks))
    for chunk in chunks:
        held = list(islice(naive_windows(counts, seed=5, start=chunk.first), len(chunk.windows)))
        assert [window for window, _ in chunk.windows] == held
        assert held[-1].start < chunk.last <= held[-1].stop
        assert all(entries == tuple(index.shards[s] for s in window.shards) for window, entries in chunk.windows)


def test_a_plan_of_a_billion_samples_needs_little_memory(large: ShardIndex) -> None:
    source = StreamDatasource(large, LAYOUT, start_step=700_000, total_steps=3_000_000, ahead=4)
    tracemalloc.start()
    assert len(source.get_read_tasks(1)) == 1
    assert sum(1 for _ in islice(source.tasks(), 200)) == 200
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50 * 2**20


def test_a_resumed_plan_of_a_billion_samples_is_the_tail_of_the_whole_one(large: ShardIndex) -> None:
    """Epochs later too, and far from the start of one."""
    step = MANY_SAMPLES // 1024 * 2 + 12_345
    (chunk,) = islice(plan_chunks(large, LAYOUT, start_step=step, total_steps=step + 1), 1)
    window, entries = chunk.windows[0]
    assert window.start <= step * 1024 < window.stop
    order = permutation(MANY_SHARDS, key=(0, 2))
    first = (step * 1024 - 2 * MANY_SAMPLES) // (MANY_SAMPLES // MANY_SHARDS) // WINDOW_SHARDS * WINDOW_SHARDS
    assert window.shards == tuple(order[first : first + WINDOW_SHARDS].tolist())
    assert [entry.url for entry in entries] == [f"shard-{shard:06d}.tar" for shard in window.shards]


def test_a_resumed_stream_reads_no_shard_of_what_came_before(tmp_path_factory: pytest.TempPathFactory) -> None:
    """All shards that only earlier steps need are gone, and nobody misses them."""
    store = Store(str(tmp_path_factory.mktemp("set")))
    index = write_set(store, sizes=(40,) * 30, holdout_fraction=0)
    layout, header = Layout(8, 16, 1, 0, 8), index.model_copy(update={"shards": ()})

    def numbers(chunk: Chunk) -> np.ndarray:
        images = [np.stack(block["image"].to_pylist()) for block in read_chunk(header, layout, chunk)]
        return number_of(np.concatenate(images))

    (whole,) = islice(plan_chunks(index, layout, start_step=40, total_steps=72), 1)
    needed = {entry.url for _, entries in whole.windows for entry in entries}
    assert len(needed) <= 18  # of 512 samples in windows of 120
    for entry in index.shards:
        if entry.url not in needed:
            store.delete(entry.url)
    found = numbers(whole)
    order = naive_windows([40] * 30, seed=0, start=640)
    expected = {
        n for w in islice(order, 6) if w.start < 1152 for shard in w.shards for n in range(40 * shard, 40 * shard + 40)
    }
    assert len(set(found)) == len(found) == 512
    assert set(found) <= expected


@pytest.mark.parametrize("ahead", [4, 2000])  # of two readers, and of a thousand
def test_no_task_is_forgotten_before_it_is_taken_and_memory_is_bounded(monkeypatch: pytest.MonkeyPatch, ahead: int):
    monkeypatch.setattr(stream.ray, "put", lambda task: task)
    monkeypatch.setattr(stream, "BlockEntry", lambda task, metadata: task)
    monkeypatch.setattr(stream, "RefBundle", lambda blocks, **_: blocks[0])
    metrics, handed = SimpleNamespace(num_inputs_received=0), ["task 0"]
    feeder: Any = stream.Feeder()
    feeder.input = SimpleNamespace(_input_data=handed, output_dependencies=[SimpleNamespace(metrics=metrics)])
    feeder.ahead, feeder.tasks = ahead, (f"task {number}" for number in range(1, 10_000))
    for number in range(5000):
        while feeder.waiting() < ahead:
            feeder.feed()
        assert handed[number] == f"task {number}"
        metrics.num_inputs_received += 1
    assert sum(task is not None for task in handed) <= stream.KEPT + ahead
