"""The order of training samples over endless epochs, a function of (set, seed, streams, position).

Batch of step s = positions [s B, (s + 1) B), and position p belongs to stream p mod C. In each epoch the training
samples stand in a line: the shards shuffled, and the samples of a shard shuffled among themselves. The line is cut into
C pieces whose lengths differ by one at most, a piece for each stream. So each epoch serves each training sample exactly
once, and nothing depends on the number of ranks: rank r of W reads the positions p with p mod W = r, which are whole
streams where W divides C (the canonical nodes of MosaicML Streaming). Batches span epochs.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np


class Places(NamedTuple):
    """The samples at n positions: sample `ordinals[i]` of the training samples of shard `shards[i]`."""

    shards: np.ndarray  # int64 (n,)  numbers in the index
    ordinals: np.ndarray  # int64 (n,)


class Epoch(NamedTuple):
    """The line of an epoch, and its pieces."""

    shards: np.ndarray  # int64 (S,)  in their order
    begins: np.ndarray  # int64 (S + 1,)  places where shards begin; last: the line's length
    positions: np.ndarray  # int64 (C,)  first position of each stream in the epoch
    starts: np.ndarray  # int64 (C,)  places in the line of the first samples of the streams
    lengths: np.ndarray  # int64 (C,)  samples of the streams in the epoch
    steps: np.ndarray  # int64 (C,)  1, or -1 for a stream that goes along its piece backward


def permutation(count: int, *, key: Sequence[int]) -> np.ndarray:  # int64 (count,)
    """A permutation as a function of `key`, for all time.
    Made of raw bits: numpy promises those to be stable, and no shuffle."""
    return np.argsort(np.random.Philox(np.random.SeedSequence(key)).random_raw(count), kind="stable")


def line_of_streams(streams: int) -> np.ndarray:  # int64 (C,)
    """The streams in the order of their pieces: those of a rank stand together for W = 2, 4, 8, ... ranks."""
    chain, rest = [], streams
    for prime in range(2, streams + 1):
        while rest % prime == 0:
            rest //= prime
            chain.append(prime * (chain[-1] if chain else 1))
    return np.array(sorted(range(streams), key=lambda stream: [stream % divisor for divisor in chain]))


class Order:
    """The order of a training.
    `counts`: training samples of each shard, in the order of the index, at least one in all; `streams`: C, >= 1."""

    def __init__(self, counts: Sequence[int] | np.ndarray, *, seed: int, streams: int) -> None:
        self.counts, self.seed, self.streams = np.asarray(counts, dtype=np.int64), seed, streams
        self.total, self.line = int(self.counts.sum()), line_of_streams(streams)
        self.epoch = lru_cache(2)(self._epoch)
        self.shuffled = lru_cache(4 * streams)(self._shuffled)

    def locate(self, positions: np.ndarray) -> Places:
        """The samples at `positions`, int64 (n,), >= 0."""
        places = Places(np.empty_like(positions), np.empty_like(positions))
        epochs = positions // self.total
        for number in np.unique(epochs):
            (where,) = np.nonzero(epochs == number)
            epoch, chosen = self.epoch(int(number)), positions[where]
            stream = chosen % self.streams
            numbers = (chosen - epoch.positions[stream]) // self.streams
            line = epoch.starts[stream] + epoch.steps[stream] * numbers
            index = self._shard_at(epoch, line)
            places.shards[where], offsets = epoch.shards[index], line - epoch.begins[index]
            for shard in np.unique(places.shards[where]):
                own = where[places.shards[where] == shard]
                places.ordinals[own] = self.shuffled(int(number), int(shard))[offsets[places.shards[where] == shard]]
        return places

    def fetched(self, sizes: Sequence[int], world_size: int) -> int:
        """Bytes that all ranks fetch in the first epoch, of shards of `sizes` bytes, each once a rank.
        A number of ranks that does not divide C reads each of gcd(W, C) sets of streams W / gcd(W, C) times."""
        epoch, groups, fetched = self.epoch(0), math.gcd(world_size, self.streams), 0
        bytes_before = np.append(0, np.cumsum(np.asarray(sizes, dtype=np.int64)[epoch.shards]))
        ends = epoch.starts + epoch.steps * (epoch.lengths - 1)
        first, last = (self._shard_at(epoch, pick(epoch.starts, ends)) for pick in (np.minimum, np.maximum))
        for group in range(groups):
            own = self.line[(self.line % groups == group) & (epoch.lengths[self.line] > 0)]
            read = np.append(-1, np.maximum.accumulate(last[own]))[:-1]  # by the pieces before
            begin = np.maximum(first[own], read + 1)
            fetched += int((bytes_before[np.maximum(last[own] + 1, begin)] - bytes_before[begin]).sum())
        return fetched * (world_size // groups)

    @staticmethod
    def _shard_at(epoch: Epoch, line: np.ndarray) -> np.ndarray:
        """Places, in the epoch's order of shards, of the shards at these places of the line."""
        return np.searchsorted(epoch.begins, line, side="right") - 1

    def _epoch(self, number: int) -> Epoch:
        first = number * self.total
        shards = permutation(len(self.counts), key=(self.seed, number))
        begins = np.append(0, np.cumsum(self.counts[shards]))
        positions = first + (np.arange(self.streams) - first) % self.streams
        lengths = np.maximum(0, -((positions - first - self.total) // self.streams))
        ends = np.cumsum(lengths[self.line])
        starts, steps = np.empty_like(positions), np.empty_like(positions)
        # Neighbors meet where a cut divides a shard: they read it at the same time.
        back = np.arange(self.streams) % 2 == 1
        starts[self.line] = np.where(back, ends - 1, ends - lengths[self.line])
        steps[self.line] = np.where(back, -1, 1)
        return Epoch(shards, begins, positions, starts, lengths, steps)

    def _shuffled(self, epoch: int, shard: int) -> np.ndarray:
        # (seed, epoch, 0) is the key (seed, epoch)
        return permutation(int(self.counts[shard]), key=(self.seed, epoch, shard + 1))
