"""Laws of what a reader holds: three shards at most, whatever their size, and small ones before they are asked for."""

import tracemalloc
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from components.data.decoded import ShardCache
from components.data.listing import ShardError
from components.data.order import WINDOW_SHARDS, windows
from components.data.shards import ShardIndex, View
from components.data.tars import iterate_shard
from components.runtime.storage.store import Store
from tests.image_sets import number_of, rewrite, write_set

VIEW = View(resolution=8)
SHARDS, SIDE = 9, 512


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    """Shards of 3 images of noise, 786 kB each; no reader keeps them decoded."""
    store = Store(str(tmp_path_factory.mktemp("noise")))
    index = write_set(store, sizes=(3,) * SHARDS, holdout_fraction=0, resolution=SIDE)
    return index.model_copy(update={"samples": 10**9})


def served(cache: ShardCache, index: ShardIndex, number: int) -> Iterator[np.ndarray]:
    """The images of some windows, as a reading task asks for them; checks what is held on the way."""
    ahead = windows([entry.train_samples for entry in index.shards], seed=0, start=0)
    for (window, following), _ in zip(pairwise(ahead), range(number), strict=False):
        now, soon = (tuple(index.shards[shard] for shard in w.shards) for w in (window, following))
        for entry in now:
            cache.fetch_ahead(index, now, soon, view=VIEW)
            yield cache.get(index, entry, view=VIEW).image.first(entry.train_samples)
            assert cache.count <= WINDOW_SHARDS or cache.nbytes <= cache.capacity


def shard_bytes(index: ShardIndex) -> int:
    return max(entry.bytes for entry in index.shards)


def test_images_are_the_same_whatever_is_held(noise: ShardIndex) -> None:
    narrow, wide = (list(served(ShardCache(capacity), noise, 6)) for capacity in (0, 2**30))
    np.testing.assert_array_equal(np.concatenate(narrow), np.concatenate(wide))


def test_memory_does_not_grow_with_the_number_of_shards(tmp_path: Path) -> None:
    """Three shards, and one more while it is unpacked."""
    index, cache = write_large(Store(str(tmp_path))), ShardCache(capacity=0)
    tracemalloc.start()
    for _ in served(cache, index, 9):
        assert cache.count <= WINDOW_SHARDS
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4.5 * shard_bytes(index)
    assert shard_bytes(index) > 2**20


def write_large(store: Store) -> ShardIndex:
    """Shards of 2 MB: images with half a megabyte behind their end, cheap to make and to decode."""
    index = write_set(store, sizes=(4,) * SHARDS, holdout_fraction=0)
    entries = []
    for entry in index.shards:
        groups = list(iterate_shard(store.read(entry.url), entry.url))
        for group in groups:
            group.members["png"] += bytes(2**19)
        entries.append(rewrite(store, entry, groups))
    return index.model_copy(update={"shards": tuple(entries), "samples": 10**9})


@pytest.fixture
def six(tmp_path: Path) -> ShardIndex:
    """Six shards of five numbered images."""
    return write_set(Store(str(tmp_path)), sizes=(5,) * 6, holdout_fraction=0)


def test_the_next_window_is_fetched_while_this_one_is_read(six: ShardIndex) -> None:
    store = Store(six.root)
    cache, now, soon = ShardCache(), six.shards[:3], six.shards[3:]
    cache.fetch_ahead(six, now, soon, view=VIEW)
    for _, tar in cache._coming.values():
        tar.result()
    for entry in six.shards:
        store.delete(entry.url)
    numbers = [number_of(cache.get(six, entry, view=VIEW).image.first(5)) for entry in now]
    cache.fetch_ahead(six, soon, (), view=VIEW)
    numbers += [number_of(cache.get(six, entry, view=VIEW).image.first(5)) for entry in soon]
    np.testing.assert_array_equal(np.concatenate(numbers), np.arange(30))


def test_what_was_fetched_for_nothing_is_dropped(noise: ShardIndex) -> None:
    cache = ShardCache()
    cache.fetch_ahead(noise, noise.shards[:3], noise.shards[3:6], view=VIEW)
    cache.fetch_ahead(noise, noise.shards[6:], (), view=VIEW)
    assert cache.count == 3


def test_what_is_held_and_needed_soon_is_not_dropped_to_fetch_what_is_needed_with_it(six: ShardIndex) -> None:
    store = Store(six.root)
    cache, shards = ShardCache(capacity=0), six.shards
    windows_of = (shards[:3], shards[3:4], (shards[2], *shards[4:]))
    numbers = []
    for now, soon in zip(windows_of, (*windows_of[1:], ()), strict=True):
        cache.fetch_ahead(six, now, soon, view=VIEW)
        numbers += [number_of(cache.get(six, entry, view=VIEW).image.first(5)) for entry in now]
        store.delete(shards[2].url)  # it was fetched, once
    np.testing.assert_array_equal(np.concatenate(numbers), [*range(20), *range(10, 15), *range(20, 30)])


def test_a_shard_that_is_spoiled_stops_the_reader_when_it_is_its_turn(six: ShardIndex) -> None:
    store = Store(six.root)
    store.write("shard-000004.tar", store.read("shard-000004.tar")[:-512])
    cache, now, soon = ShardCache(), six.shards[:3], six.shards[3:]
    cache.fetch_ahead(six, now, soon, view=VIEW)
    assert [cache.get(six, entry, view=VIEW).image.resolution for entry in now] == [8, 8, 8]
    with pytest.raises(ShardError, match=r"shard-000004\.tar has"):
        cache.get(six, six.shards[4], view=VIEW)
