"""The order of training samples: an endless stream over epochs, a function of (set, seed, position).

Batch of step s = positions [s B, (s + 1) B). Each epoch serves each training sample exactly once, in an order of its
own: shards shuffled, then samples shuffled within windows of a few consecutive shards, so that a reader needs few
shards at a time. Batches span windows and epochs. Nothing depends on the number of workers, and any position can be
computed without earlier positions: a stream that starts at step s is the tail of the stream that starts at 0.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

WINDOW_SHARDS = 3


class ShuffleWindow(NamedTuple):
    """A few consecutive shards, with jointly shuffled training samples."""

    epoch: int
    number: int  # of the window in its epoch
    start: int  # position of the window's first sample in the stream
    shards: tuple[int, ...]
    counts: tuple[int, ...]  # training samples of each shard

    @property
    def stop(self) -> int:
        """Position after the window's last sample."""
        return self.start + sum(self.counts)


class Pick(NamedTuple):
    """The samples of n positions of a window: number i is sample `ordinals[i]` of shard `places[i]`."""

    window: ShuffleWindow
    places: np.ndarray  # int64 (n,)  place of the shard in the window
    ordinals: np.ndarray  # int64 (n,)  number of the sample among the shard's training samples


def permutation(count: int, *, key: Sequence[int]) -> np.ndarray:  # int64 (count,)
    """A permutation as a function of `key`, for all time.
    Made of raw bits: numpy promises those to be stable, and no shuffle."""
    return np.argsort(np.random.Philox(np.random.SeedSequence(key)).random_raw(count), kind="stable")


def windows(counts: Sequence[int], *, seed: int, start: int) -> Iterator[ShuffleWindow]:
    """The windows of the endless stream, from the window that holds position `start`.

    Args:
        counts: training samples of each shard, in the order of the index; at least one in all.
        seed: of the run, >= 0.
        start: position in the stream, >= 0.
    """
    sizes = np.asarray(counts, dtype=np.int64)
    total = int(sizes.sum())
    epoch = start // total
    while True:
        order = permutation(len(sizes), key=(seed, epoch))
        begins = epoch * total + np.append(0, np.cumsum(sizes[order]))  # positions where the shards of `order` begin
        starts = begins[:-1:WINDOW_SHARDS]
        stops = np.append(starts[1:], begins[-1])
        for number in range(int(np.searchsorted(stops, start, side="right")), len(starts)):
            shards = order[number * WINDOW_SHARDS : (number + 1) * WINDOW_SHARDS]
            if stops[number] > starts[number]:
                yield ShuffleWindow(
                    epoch, number, int(starts[number]), tuple(shards.tolist()), tuple(sizes[shards].tolist())
                )
        epoch += 1


def pick(window: ShuffleWindow, *, seed: int, first: int, last: int) -> Pick:
    """The samples of `window` at those of its positions that lie in [first, last)."""
    order = permutation(sum(window.counts), key=(seed, window.epoch, window.number))
    chosen = order[max(first - window.start, 0) : max(last - window.start, 0)]
    ends = np.cumsum(window.counts)
    places = np.searchsorted(ends, chosen, side="right")
    return Pick(window, places, chosen - (ends - window.counts)[places])
