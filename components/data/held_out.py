"""A split read in canonical order, for measures and images that must not depend on the training order.

Shapes: N samples, H = W = resolution, L text_length.
"""

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from components.data.decoded import DecodedShard
from components.data.degradations import Degradation, degrade
from components.data.shards import Member, ShardEntry, ShardIndex, Split, read_shard, split_of

logger = logging.getLogger(__name__)


class SplitArrays(NamedTuple):
    image: np.ndarray  # (N, H, W, 3) uint8
    label: np.ndarray  # (N,) int64
    text: np.ndarray  # (N, L) int64
    caption: tuple[str, ...]
    key: tuple[str, ...]
    split: tuple[Split, ...]
    condition_image: np.ndarray | None = None  # (N, H, W, 3) uint8, where a condition member is asked for
    arrays: Mapping[str, np.ndarray] = MappingProxyType({})  # name -> (N, ...) float16, where arrays are asked for


def read_split(
    index: ShardIndex,
    split: Split,
    *,
    resolution: int,
    limit: int | None = None,
    member: Member = "image",
    condition_member: Member | None = None,
    arrays: Sequence[str] = (),
) -> SplitArrays:
    """The samples of a split in the order of the index; the first `limit` of them. Raises ShardError.

    Args:
        member: what of each sample is its image, here and below.
        condition_member: what of each sample is its condition image, where there is one, here and below.
        arrays: names of arrays of the set that are wanted too, here and below.
    """
    decoded = partial(
        DecodedShard,
        index,
        split=split,
        resolution=resolution,
        member=member,
        condition_member=condition_member,
        arrays=arrays,
    )
    found: list[SplitArrays] = []
    count = 0
    for entry in index.shards:
        shard = decoded(entry)
        found.append(_arrays(shard, len(shard.samples) if limit is None else limit - count))
        count += len(found[-1].key)
        if count == limit:
            break
    return SplitArrays(
        np.concatenate([part.image for part in found]),
        np.concatenate([part.label for part in found]),
        np.concatenate([part.text for part in found]),
        tuple(caption for part in found for caption in part.caption),
        tuple(key for part in found for key in part.key),
        tuple(name for part in found for name in part.split),
        _joined([part.condition_image for part in found]),
        {name: np.concatenate([part.arrays[name] for part in found]) for name in arrays},
    )


def _joined(parts: list[np.ndarray | None]) -> np.ndarray | None:
    present = [part for part in parts if part is not None]
    return np.concatenate(present) if present else None


class Words(NamedTuple):
    """What samples of a split are known by."""

    label: np.ndarray  # (N,) int64
    caption: tuple[str, ...]


class WordReader:
    """One worker of a pool: the words of shards, whose images stay undecoded."""

    def __init__(self, index: ShardIndex, split: Split) -> None:
        self.index, self.split = index, split

    def __call__(self, entry: ShardEntry) -> Words:
        """In the order of the shard. Raises ShardError."""
        samples = [
            sample
            for sample in read_shard(self.index, entry)
            if split_of(sample.key, self.index.holdout_fraction) == self.split
        ]
        return Words(
            np.array([sample.label for sample in samples], dtype=np.int64), tuple(sample.caption for sample in samples)
        )


def joined_words(parts: Sequence[Words]) -> Words:
    """Of several shards, one at least."""
    return Words(
        np.concatenate([part.label for part in parts]), tuple(caption for part in parts for caption in part.caption)
    )


def read_whole_shard(index: ShardIndex, entry: ShardEntry, *, resolution: int, member: Member = "image") -> SplitArrays:
    """All usable samples of one shard, of both splits, in tar order. Raises ShardError."""
    shard = DecodedShard(index, entry, resolution=resolution, split=None, member=member)
    return _arrays(shard, len(shard.samples))


def _arrays(shard: DecodedShard, limit: int) -> SplitArrays:
    """The first samples of a shard, at most `limit`."""
    samples = shard.samples[:limit]
    return SplitArrays(
        shard.image.first(len(samples)),
        shard.labels[: len(samples)],
        shard.text[: len(samples)],
        tuple(sample.caption for sample in samples),
        tuple(sample.key for sample in samples),
        tuple(shard.splits[: len(samples)]),
        None if shard.condition is None else shard.condition.first(len(samples)),
        shard.array_rows(np.arange(len(samples))),
    )


def held_out_arrays(
    index: ShardIndex,
    *,
    resolution: int,
    limit: int,
    member: Member = "image",
    condition_member: Member | None = None,
    degradation: Degradation | None = None,
    arrays: Sequence[str] = (),
) -> dict[str, np.ndarray]:
    """The first held-out samples as a batch: `image` uint8 (N, H, W, 3), `label` int64 (N,), `text` int64 (N, L).

    With a condition member also `condition_image`, uint8 (N, H, W, 3); with a degradation this and `task`, int64 (N,),
    drawn by the samples' own numbers; with arrays these, float16 (N, ...). A set that holds nothing out (a choice of
    its `holdout_fraction`, or too few images) shows training samples, and says so in the log. Raises ShardError.
    """
    read = partial(
        read_split,
        index,
        resolution=resolution,
        limit=limit,
        member=member,
        condition_member=condition_member,
        arrays=arrays,
    )
    samples = read("holdout")
    if not samples.key:
        logger.warning("%s holds no image out: previews and evaluation use training images", index.source)
        samples = read("train")
    rows = {"image": samples.image, "label": samples.label, "text": samples.text, **samples.arrays}
    if samples.condition_image is not None:
        rows["condition_image"] = samples.condition_image
    if degradation is not None:
        rows |= degrade(samples.image, np.arange(len(samples.key)), degradation)
    return rows
