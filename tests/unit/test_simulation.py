"""Laws of the simulator: what it counts is what the order says, and its clock obeys the store."""

from pathlib import Path

import numpy as np
import pytest

from components.data.decoded import ImageSamples
from components.data.order import Order
from components.data.shards import View
from components.data.stream import Share
from tests.benchmarks import simulate
from tests.benchmarks.simulate import MEASURES, Meter, index_of
from tests.benchmarks.simulated_ranks import Place, Reading, read

SHARDS, IMAGES, STREAMS = 60, 6_000, 24
SET = ImageSamples(index_of(SHARDS, IMAGES), View(256))
SIZES = [entry.bytes for entry in SET.index.shards]
ORDER = Order(SET.counts, seed=0, streams=STREAMS)


def epoch(world_size: int, place: Place) -> list[Reading]:
    """An epoch of every rank, in steps of 24."""
    share = Share(24, 0, STREAMS, IMAGES // 24, world_size=world_size)
    return [read(SET, share._replace(rank=rank), ORDER, place) for rank in range(world_size)]


@pytest.mark.parametrize("world_size", [1, 2, 8, 24])
def test_requests_and_bytes_are_those_of_the_order_and_each_sample_is_served_once(world_size: int) -> None:
    requested, fetched = 0, 0
    runs = epoch(world_size, Place())
    for run in runs:
        served = set(ORDER.locate(run.positions).shards.tolist())
        own = [shard for shard in run.fetched if shard in served]  # others are fetched ahead, for the next epoch
        requested, fetched = requested + len(own), fetched + sum(SIZES[shard] for shard in own)
    assert requested == ORDER.fetched([1] * SHARDS, world_size)
    assert fetched == ORDER.fetched(SIZES, world_size)
    assert np.sort(np.concatenate([run.positions for run in runs])).tolist() == list(range(IMAGES))


@pytest.mark.parametrize("name", ["saving", "index", "tokens"])
def test_every_process_is_measured(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulate, "IMAGES", 1_000)
    MEASURES["saving"](20, tmp_path, Meter())
    MEASURES[name](20, tmp_path, meter := Meter())
    meter.peak()
    assert meter.figures["peak_MB"] > 0
