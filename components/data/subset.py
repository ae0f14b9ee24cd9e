"""A random part of a set, for measures that need some thousand images of it and not all."""

import random
from collections.abc import Sequence

from components.data.held_out import SplitArrays, read_split
from components.data.shards import ShardIndex


def random_part(index: ShardIndex, *, samples: int, seed: int) -> ShardIndex:
    """Whole shards, at least one, drawn by the seed, until they hold `samples` training samples; in canonical order.

    The set itself if it holds no more. Its shards are expected to be shuffled within, as those that are ingested here.
    """
    order = list(range(len(index.shards)))
    random.Random(seed).shuffle(order)
    chosen, found = [], 0
    for number in order:
        if chosen and found >= samples:
            break
        chosen.append(number)
        found += index.shards[number].train_samples
    return index.model_copy(update={"shards": tuple(index.shards[number] for number in sorted(chosen))})


def read_random_part(
    index: ShardIndex, *, samples: int, seed: int, resolution: int, arrays: Sequence[str] = ()
) -> SplitArrays:
    """At most `samples` training samples of a random part, in canonical order. Raises ShardError."""
    part = random_part(index, samples=samples, seed=seed)
    return read_split(part, "train", resolution=resolution, limit=samples, arrays=arrays)
