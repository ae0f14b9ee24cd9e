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

from components.data.decoded import DecodedShard, ImageSamples
from components.data.images import Degradation, degrade
from components.data.shards import ShardEntry, ShardIndex, ShardSample, Split, View, read_shard, split_of
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


def read_split(index: ShardIndex, split: Split | None, view: View, *, limit: int | None = None) -> SplitArrays:
    """The first `limit` samples of a split (None: of both), in the order of the index. Raises ShardError.
    Fetches no shard without such samples."""
    all_samples, train = (column_of(index.shards, name) for name in ("samples", "train_samples"))
    counts = all_samples if split is None else train if split == "train" else all_samples - train
    places = np.append(0, np.cumsum(counts)).clip(0, limit)  # of the shards' samples, and the end
    rows, samples = ImageSamples(index, view).empty(int(places[-1])), list[ShardSample]()
    for number in np.flatnonzero(np.diff(places)).tolist():
        own = np.arange(places[number], places[number + 1])
        shard = DecodedShard(index, index.shards[number], view, split=split)
        shard.fill(rows, own, own - own[0])
        samples += shard.samples[: len(own)]
    return SplitArrays(
        rows["image"],
        rows["label"],
        rows["text"],
        tuple(sample.caption for sample in samples),
        tuple(sample.key for sample in samples),
        rows.get("condition_image"),
        {name: rows[name] for name in view.arrays},
    )


class Words(NamedTuple):
    """Labels and captions of the samples of a split."""

    label: np.ndarray  # (N,) int64
    caption: tuple[str, ...]


def shard_words(index: ShardIndex, split: Split, entry: ShardEntry) -> Words:
    """The words of a shard's samples of a split, in tar order; decodes no image. Raises ShardError."""
    own = [sample for sample in read_shard(index, entry) if split_of(sample.key, index.holdout_fraction) == split]
    return Words(np.array([sample.label for sample in own], dtype=np.int64), tuple(sample.caption for sample in own))


def joined_words(parts: Sequence[Words]) -> Words:
    """Joins the words of several shards, at least a single shard."""
    labels, captions = zip(*parts, strict=True)
    return Words(np.concatenate(labels), tuple(chain.from_iterable(captions)))


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
