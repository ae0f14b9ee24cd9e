"""Laws of the simulator: what it counts is what the order says, and its clock obeys the store."""

import math
from pathlib import Path

import numpy as np
import pytest

from components.data.decoded import ImageSamples
from components.data.order import Order
from components.data.shards import View
from components.data.stream import Share
from tests.benchmarks import simulate
from tests.benchmarks.simulate import MEASURES, Meter, index_of, reading
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


def test_a_store_without_latency_makes_no_rank_wait() -> None:
    at_once = Place(first_byte=0, connection=math.inf, network=math.inf, decoding=0, rate=100)
    for run in epoch(2, at_once):
        assert (run.first_batch, run.waited) == (0, 0)
        assert run.seconds == pytest.approx(IMAGES / 2 / 100)


def test_no_rank_is_faster_than_its_connections() -> None:
    slow = Place(first_byte=0.01, connection=1e5, threads=2)
    for run in epoch(2, slow):
        needed = sum(SIZES[shard] for shard in run.fetched[:-STREAMS])  # the last ones are of the next epoch
        assert run.seconds >= needed / (2 * slow.connection)
        assert run.waited > 0
        assert run.starts == sorted(run.starts)


def test_what_some_ranks_ask_is_what_the_order_says_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulate, "WINDOW", 30_000)
    row = reading(ImageSamples(index_of(240, 240_000), View(256)), 8, 48, Place())
    assert row["requests_per_s_window"] == pytest.approx(row["requests_per_s"], rel=0.05)
    assert row["bytes_per_byte"] == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("name", ["saving", "index", "tokens"])
def test_every_process_is_measured(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulate, "IMAGES", 1_000)
    MEASURES["saving"](20, tmp_path, Meter())
    MEASURES[name](20, tmp_path, meter := Meter())
    meter.peak()
    assert meter.figures["peak_MB"] > 0
