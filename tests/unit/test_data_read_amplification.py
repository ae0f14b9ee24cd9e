"""Laws of how often shards are fetched: the plan is what a server sends; what is recommended is fetched about once."""

import os
from pathlib import Path

import numpy as np
import pytest

from components.data import stream
from components.data.decoded import CACHE_BYTES, tokenizer_of
from components.data.read_amplification import GOOD, estimated_index, even_index, planned_reads, recommended_samples
from components.data.shards import ShardIndex, load_index, save_index
from components.data.sources.webdataset import list_tars
from components.data.stream import Layout
from components.runtime.storage.store import Store
from pipelines.command.data import TAR_SAMPLES
from tests.benchmarks.photos import write_photos
from tests.counted_files import counted_files
from tests.image_sets import write_set
from tests.simulated_readers import read_epoch
from tests.unit.test_data_planning import index_of

READERS, BATCH = 16, 16
IMAGENET, TARS = 1_281_167, 147  # images, tars of 1 GB


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 48 samples, as those of large images are small next to large tars."""
    monkeypatch.setattr(stream, "CHUNK_ROWS", 48)
    monkeypatch.setattr(stream, "GROUP_ROWS", 16)


def imagenet() -> ShardIndex:
    index = index_of([IMAGENET // TARS + (number < IMAGENET % TARS) for number in range(TARS)])
    shards = tuple(entry.model_copy(update={"bytes": 10**9}) for entry in index.shards)
    return index.model_copy(update={"shards": shards})


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("capacity", [0, 1_000_000, CACHE_BYTES])
@pytest.mark.parametrize(("sizes", "holdout"), [((90, 110) * 5, 0.2), ((7, 9) * 40, 0)])
def test_the_plan_is_what_a_server_sends_to_sixteen_readers(
    tmp_path: Path, sizes: tuple[int, ...], holdout: float, capacity: int
) -> None:
    """To the byte: of ten tars and of 80 small ones, for readers that hold three shards, some, or all."""
    index = write_set(Store(str(tmp_path)), sizes=sizes, holdout_fraction=holdout)
    layout = Layout(8, BATCH, 1, 5, 8)
    with counted_files(tmp_path) as server:
        index = index.model_copy(update={"root": server.url, "samples": 10**9})  # no reader keeps images decoded
        tokenizer_of(index)
        server.sent.clear()
        positions = read_epoch(index, layout, readers=READERS, capacity=capacity)
    planned = planned_reads(index, layout, readers=READERS, capacity=capacity)
    assert sum(server.sent) == planned.fetched
    np.testing.assert_array_equal(positions, np.arange(len(positions)))
    assert len(positions) >= index.train_samples
    large = len(sizes) == 10
    assert planned.amplification > 4 if large else planned.amplification < 1.7


def test_imagenet_in_tars_of_a_gigabyte_is_read_so_often_and_no_less_by_more_readers() -> None:
    """SCALE.md's figures."""
    index = imagenet()
    for (resolution, workers), said in {(64, 64): 7.0, (256, 64): 35.0, (512, 64): 35.0, (256, 128): 21.4}.items():
        found = planned_reads(index, Layout(resolution, 256, workers, 0, 16), readers=2 * workers).amplification
        assert found == pytest.approx(said, abs=0.1)
    index, layout = imagenet(), Layout(256, 256, 8, 0, 16)
    found = [planned_reads(index, layout, readers=readers).fetched for readers in (1, 2, 4, 8, 16, 64)]
    assert found == sorted(found)
    assert found[0] / sum(entry.bytes for entry in index.shards) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("resolution", [64, 256, 512])
def test_the_recommended_size_is_the_largest_that_is_read_about_once_and_at_256_the_default(resolution: int) -> None:
    index, layout = imagenet(), Layout(resolution, 256, 64, 0, 16)
    samples = recommended_samples(index, layout, readers=128)

    def read(samples: int) -> float:
        made = even_index(index, samples_per_shard=samples, sample_bytes=110_000, most=200 * layout.chunk_rows)
        return planned_reads(made, layout, readers=128).amplification

    assert read(samples) <= GOOD + 0.01 < read(2 * samples)
    assert samples == TAR_SAMPLES or resolution != 256


@pytest.mark.parametrize("resolution", [64, 256])
def test_tars_that_nobody_has_read_are_estimated_by_the_head_of_one(tmp_path: Path, resolution: int) -> None:
    """Within five parts in a hundred of what their index says."""
    write_photos(tmp_path / "tars", resolution=resolution, shards=3, samples=500)
    found = estimated_index(list_tars(str(tmp_path / "tars")), holdout_fraction=0.1, text_length=8)
    assert [entry.bytes for entry in found.shards] == [os.path.getsize(entry.url) for entry in found.shards]
    assert found.samples == pytest.approx(1500, rel=0.05)
    assert found.train_samples == pytest.approx(1350, rel=0.05)


def test_an_index_that_is_loaded_again_has_the_same_plan(tmp_path: Path) -> None:
    index, layout = write_set(Store(str(tmp_path)), sizes=(40,) * 8), Layout(8, BATCH, 1, 5, 8)
    planned = planned_reads(index, layout, readers=4)
    save_index(Store(str(tmp_path)), index)
    assert planned_reads(load_index(str(tmp_path)), layout, readers=4) == planned
