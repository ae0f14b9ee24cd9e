"""Splits, and random parts of a set, read in canonical order, independent of the training order.

Shapes: N samples, H = W = resolution, L text_length.
"""

import logging
import random
from collections.abc import Mapping, Sequence
from itertools import accumulate, chain
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from components.data.decoded import DecodedShard
from components.data.images import Degradation, degrade
from components.data.shards import ShardEntry, ShardIndex, Split, View, read_shard, split_of
from components.runtime.storage.model_table import column_of

logger = logging.getLogger(__name__)
SMALL = 8  # pixels of a side, where only captions and labels are wanted


class SplitArrays(NamedTuple):
    """The samples of a split as columns."""

    image: np.ndarray  # (N, H, W, 3) uint8
    label: np.ndarray  # (N,) int64
    text: np.ndarray  # (N, L) int64
    caption: tuple[str, ...]
    key: tuple[str, ...]
    condition_image: np.ndarray | None = None  # (N, H, W, 3) uint8, with a condition member
    arrays: Mapping[str, np.ndarray] = MappingProxyType({})  # name -> (N, ...) float16


def read_split(index: ShardIndex, split: Split, view: View, *, limit: int | None = None) -> SplitArrays:
    """The first `limit` samples of a split in the order of the index. Raises ShardError."""
    parts: list[SplitArrays] = []
    count = 0
    for entry in index.shards:
        shard = DecodedShard(index, entry, view, split=split)
        parts.append(shard_arrays(shard, None if limit is None else limit - count))
        count += len(parts[-1].key)
        if count == limit:
            break
    conditions = [part.condition_image for part in parts if part.condition_image is not None]
    image, label, text, caption, key, *_ = zip(*parts, strict=True)
    return SplitArrays(
        np.concatenate(image),
        np.concatenate(label),
        np.concatenate(text),
        tuple(chain.from_iterable(caption)),
        tuple(chain.from_iterable(key)),
        np.concatenate(conditions) if conditions else None,
        {name: np.concatenate([part.arrays[name] for part in parts]) for name in view.arrays},
    )


class Words(NamedTuple):
    """Labels and captions of the samples of a split."""

    label: np.ndarray  # (N,) int64
    caption: tuple[str, ...]


class WordReader:
    """A worker of a pool: reads the words of shards, without decoding images."""

    def __init__(self, index: ShardIndex, split: Split) -> None:
        self.index, self.split = index, split

    def __call__(self, entry: ShardEntry) -> Words:
        """The words of a shard's samples, in tar order. Raises ShardError."""
        share, samples = self.index.holdout_fraction, read_shard(self.index, entry)
        words = [(sample.label, sample.caption) for sample in samples if split_of(sample.key, share) == self.split]
        return Words(np.array([label for label, _ in words], dtype=np.int64), tuple(caption for _, caption in words))


def joined_words(parts: Sequence[Words]) -> Words:
    """Joins the words of several shards, at least a single shard."""
    labels, captions = zip(*parts, strict=True)
    return Words(np.concatenate(labels), tuple(chain.from_iterable(captions)))


def shard_arrays(shard: DecodedShard, limit: int | None = None) -> SplitArrays:
    """The first samples of a shard, at most `limit`."""
    samples = shard.samples[:limit]
    return SplitArrays(
        shard.image.first(len(samples)),
        shard.labels[: len(samples)],
        shard.text[: len(samples)],
        tuple(sample.caption for sample in samples),
        tuple(sample.key for sample in samples),
        None if shard.condition is None else shard.condition.first(len(samples)),
        shard.array_rows(np.arange(len(samples))),
    )


def held_out_arrays(
    index: ShardIndex, view: View, *, limit: int, degradation: Degradation | None = None
) -> dict[str, np.ndarray]:
    """The first held-out samples as a batch, with the columns of `ImageSamples` but `position`.
    Degradations are drawn by the samples' own numbers. Of a set without held-out samples (a choice of its
    `holdout_fraction`, or too few images) training samples are read, with a warning. Raises ShardError."""
    samples = read_split(index, "holdout", view, limit=limit)
    if not samples.key:
        logger.warning("%s holds no image out: previews and evaluation use training images", index.source)
        samples = read_split(index, "train", view, limit=limit)
    rows = {"image": samples.image, "label": samples.label, "text": samples.text, **samples.arrays}
    if samples.condition_image is not None:
        rows["condition_image"] = samples.condition_image
    if degradation is not None:
        rows |= degrade(samples.image, np.arange(len(samples.key)), degradation)
    return rows


def random_part(index: ShardIndex, *, samples: int, seed: int) -> ShardIndex:
    """Whole shards of a set, drawn by the seed until they hold `samples` training samples.
    At least one shard, in canonical order; the whole set if it holds no more samples."""
    order = list(range(len(index.shards)))
    random.Random(seed).shuffle(order)
    before = accumulate(column_of(index.shards, "train_samples")[order].tolist(), initial=0)
    chosen = [number for number, count in zip(order, before, strict=False) if number == order[0] or count < samples]
    return index.model_copy(update={"shards": tuple(index.shards[number] for number in sorted(chosen))})
