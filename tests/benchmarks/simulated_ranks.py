"""Ranks that read a set from a simulated store: order, cut into blocks, and what is held when are the product's own
(`Order`, `Layout`, `RankReader`); time, the store and decoding are simulated.

A rank takes samples at an even rate. Its reader makes blocks ahead, as many as may wait for training, and each of its
threads has a connection to the store.
"""

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import numpy as np

from components.data.decoded import ImageSamples
from components.data.order import Order
from components.data.stream import AHEAD_BLOCKS, Arrays, Layout, RankReader, Share


class Place(NamedTuple):
    """Store, network and cores of a rank.

    Requests a second and the bandwidth of a connection are those of Amazon's guide "Best practices design patterns:
    optimizing Amazon S3 performance"; decoding is that of 256² in components/data/SCALE.md.
    """

    first_byte: float = 0.1  # seconds
    connection: float = 90e6  # bytes/s of a request
    network: float = 12.5e9  # bytes/s of a node
    ranks: int = 8  # of a node
    threads: int = 4  # of a reader; they fetch, and as many decode
    decoding: float = 0.87e-3  # seconds of a core for a sample
    rate: float = 500.0  # samples/s that a rank takes


@dataclass
class Network:
    """Connections of a rank, and its clock in seconds."""

    place: Place
    now: float = 0.0
    due: float = 0.0  # when the last shard of the block at work is there
    starts: list[float] = field(default_factory=list)  # of requests
    fetched: list[int] = field(default_factory=list)  # numbers of shards
    free: list[float] = field(default_factory=list)  # when connections are

    def fetch(self, shard: int, nbytes: int) -> "Arrival":
        """Queues a request; a thread takes them in turn."""
        place = self.place
        self.free = self.free or [0.0] * place.threads
        start = max(self.now, heapq.heappop(self.free))
        bandwidth = min(place.connection, place.network / place.ranks / place.threads)
        heapq.heappush(self.free, ready := start + place.first_byte + nbytes / bandwidth)
        self.starts.append(start)
        self.fetched.append(shard)
        return Arrival(self, nbytes, ready)


class Arrival(NamedTuple):
    """A shard on its way, and the future of it."""

    network: Network
    nbytes: int
    ready: float

    def done(self) -> bool:
        return self.ready <= self.network.now

    def result(self) -> "Arrival":
        return self

    def fill(self, rows: Arrays, where: np.ndarray, ordinals: np.ndarray) -> None:
        self.network.due = max(self.network.due, self.ready)


@dataclass(frozen=True)
class StoredSamples:
    """The samples of a set whose shards a simulated network fetches."""

    decoded: ClassVar[bool] = False

    images: ImageSamples
    network: Network

    @property
    def counts(self) -> np.ndarray:
        return self.images.counts

    def empty(self, rows: int) -> Arrays:
        return self.images.empty(rows)

    def open(self, shard: int) -> Arrival:
        return self.network.fetch(shard, self.images.index.shards[shard].bytes)

    def complete(self, rows: Arrays) -> Arrays:
        return rows


class InTurn:
    """A pool of no threads: what is submitted is done at once."""

    map: ClassVar = staticmethod(map)

    def submit(self, action: Callable[[int], Arrival], shard: int) -> Arrival:
        return action(shard)


class Reading(NamedTuple):
    """A rank's reading of some steps."""

    starts: list[float]  # of its requests, seconds
    fetched: list[int]  # numbers of the shards, one for each request
    positions: np.ndarray  # int64  of the samples served
    first_batch: float  # seconds
    seconds: float  # of all steps
    waited: float  # seconds of training after the first batch
    busy: float  # seconds of the reader
    held_shards: int  # at the most
    held_bytes: int


def read(images: ImageSamples, share: Share, order: Order, place: Place) -> Reading:
    """Simulates the share's steps. `order`: of the set, shared by ranks to save memory."""
    network, layout = Network(place), Layout.of(images, share)
    reader = RankReader(StoredSamples(images, network), share, layout=layout)
    reader.order, reader.fetching, reader.filling = order, InTurn(), InTurn()  # pyrefly: ignore[bad-assignment]
    made, busy, held, positions = 0.0, 0.0, [(0, 0)], list[np.ndarray]()
    begun, ended = list[float](), list[float]()  # when training takes a block, and has used it
    for first in range(share.start_step, share.total_steps, layout.block_steps):
        network.now = network.due = max(made, begun[-AHEAD_BLOCKS] if len(begun) >= AHEAD_BLOCKS else 0.0)
        rows = reader.rows(first, min(first + layout.block_steps, share.total_steps))
        held.append((len(reader.shards), sum(shard.result().nbytes for shard in reader.shards.values())))
        positions.append(rows["position"])
        made = network.due + len(positions[-1]) * place.decoding / place.threads
        busy += made - network.now
        begun.append(max([made, *ended[-1:]]))
        ended.append(begun[-1] + len(positions[-1]) / place.rate)
    waited = sum(begin - end for end, begin in zip(ended, begun[1:], strict=False))
    most = (max(column) for column in zip(*held, strict=True))
    return Reading(network.starts, network.fetched, np.concatenate(positions), begun[0], ended[-1], waited, busy, *most)
