"""Laws of a reader: it holds the shards that are due, whatever their number and size, and each is fetched once."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from components.data import stream
from components.data.decoded import ImageSamples
from components.data.listing import ShardError
from components.data.shards import ShardIndex, View
from components.data.stream import Layout, RankReader, Share
from components.runtime.storage.store import Store
from tests.counted_files import counted_files
from tests.image_sets import number_of, write_set

VIEW = View(resolution=8)


def reader_of(index: ShardIndex, batch: int = 16, **place: int) -> RankReader:
    samples, share = ImageSamples(index, VIEW), Share(batch, 5, 12, 10**6, **place)
    return RankReader(samples, share, layout=Layout.of(samples, share))


def epochs(index: ShardIndex, reader: RankReader, number: int, *, steps: int = 3) -> list[np.ndarray]:
    """Numbers of the images of the first epochs of a rank, block by block."""
    last = number * index.train_samples // reader.share.global_batch_size
    blocks = range(0, last, steps)
    return [number_of(reader.rows(first, min(first + steps, last))["image"]) for first in blocks]


@pytest.fixture
def six(tmp_path: Path) -> ShardIndex:
    """Six shards of five numbered images."""
    return write_set(Store(str(tmp_path)), sizes=(5,) * 6, holdout_fraction=0)


@pytest.fixture
def kept_briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is kept that is not due, and little is fetched ahead."""
    monkeypatch.setattr(stream, "SPARE_BYTES", 0)
    monkeypatch.setattr(stream, "SOON_ROWS", 16)


def test_images_are_the_same_whatever_is_held(six: ShardIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    wide = epochs(six, reader_of(six, batch=6), 4)
    monkeypatch.setattr(stream, "SPARE_BYTES", 0)
    monkeypatch.setattr(stream, "SOON_ROWS", 1)
    narrow = epochs(six, reader_of(six, batch=6), 4)
    np.testing.assert_array_equal(np.concatenate(wide), np.concatenate(narrow))


@pytest.mark.usefixtures("kept_briefly")
def test_a_reader_of_many_shards_holds_those_of_its_streams_and_no_more(tmp_path: Path) -> None:
    """Four for each of six streams at most, where shards are small; ten times as many shards change nothing."""
    held = []
    for shards in (60, 600):
        index = write_set(Store(str(tmp_path / str(shards))), sizes=(8,) * shards, holdout_fraction=0)
        reader, most = reader_of(index, rank=1, world_size=2), 0
        for step in range(min(300, shards * 8 // 16)):
            reader.rows(step, step + 1)
            most = max(most, len(reader.shards))
        held.append(most)
    assert max(held) <= 6 * 4
    assert held[1] <= held[0] + 2


@pytest.mark.usefixtures("kept_briefly")
@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_a_server_sends_the_bytes_that_the_order_says(tmp_path: Path, world_size: int) -> None:
    """To the byte, each rank by itself; alone each shard once, and the tokenizer beside."""
    index = write_set(Store(str(tmp_path)), sizes=(30, 34) * 20, holdout_fraction=0)
    with counted_files(tmp_path) as server:
        served = index.model_copy(update={"root": server.url})
        readers = [reader_of(served, rank=rank, world_size=world_size) for rank in range(world_size)]
        readers[0].samples.open(0)
        server.sent.clear()
        numbers = [epochs(served, reader, 1) for reader in readers]
    sizes = [entry.bytes for entry in index.shards]
    following = 2 * 12 * max(sizes) * world_size  # shards of the next epoch, which are fetched ahead
    assert 0 <= sum(server.sent) - readers[0].order.fetched(sizes, world_size) <= following
    assert Counter(np.concatenate([block for own in numbers for block in own]).tolist()) == Counter(range(32 * 40))


def test_shards_are_fetched_before_they_are_due(six: ShardIndex) -> None:
    reader = reader_of(six, batch=6)
    reader.rows(0, 1)
    for shard in reader.shards.values():
        shard.result()
    for entry in six.shards:
        Store(six.root).delete(entry.url)
    assert sorted(np.concatenate(epochs(six, reader, 1)).tolist()) == list(range(30))


@pytest.mark.usefixtures("kept_briefly")
def test_a_resumed_stream_reads_no_shard_of_what_came_before(tmp_path: Path) -> None:
    """All shards that only earlier steps need are gone, and nobody misses them."""
    index = write_set(Store(str(tmp_path)), sizes=(40,) * 60, holdout_fraction=0)
    reader = reader_of(index)
    needed = set(reader.order.locate(np.arange(16 * 120, 40 * 60)).shards.tolist())
    assert len(needed) < 30
    for number, entry in enumerate(index.shards):
        if number not in needed:
            Store(index.root).delete(entry.url)
    numbers = [number_of(reader.rows(step, step + 1)["image"]) for step in range(120, 145)]
    assert len(set(np.concatenate(numbers).tolist())) == 16 * 25


def test_a_shard_that_is_spoiled_stops_the_reader_when_it_is_its_turn(tmp_path: Path) -> None:
    index = write_set(Store(str(tmp_path)), sizes=(20,) * 24, holdout_fraction=0)
    reader = reader_of(index, batch=12)
    due = set(reader.order.locate(np.arange(12)).shards.tolist())
    spoiled = next(number for number in range(24) if number not in due)
    store, name = Store(index.root), index.shards[spoiled].url
    store.write(name, store.read(name)[:-512])
    assert len(reader.rows(0, 1)["image"]) == 12
    with pytest.raises(ShardError, match=rf"{name} differs: it has"):
        epochs(index, reader, 1)


def test_tasks_are_few_however_long_a_run_is_and_huge_images_are_read_a_step_at_a_time(six: ShardIndex) -> None:
    for steps in (10, 10**5, 10**9):
        share = Share(64, 0, 12, steps)
        layout = Layout.of(ImageSamples(six, VIEW), share)
        assert steps <= layout.task_steps * stream.MOST_TASKS
        assert layout.task_steps % layout.block_steps == 0
        assert layout.block_bytes <= 2 * stream.BLOCK_BYTES
    huge = Layout.of(ImageSamples(six, View(1024)), Share(64, 0, 12, 10))
    assert huge.block_steps == 1
