"""Shards decoded for a reader, kept in its process while memory allows: a small set is fetched and decoded once.

Shapes: N samples, n of them asked for, H = W = resolution, L text_length.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from components.data.errors import ShardError
from components.data.order import WINDOW_SHARDS
from components.data.pictures import load_depth, load_mask, load_picture
from components.data.shards import Member, ShardEntry, ShardIndex, ShardSample, Split, read_bpe, read_shard, split_of
from components.sampling.text_encoding import encode_text, parse_bpe

CACHE_BYTES = 96 * 2**20  # of one reading process


class Pictures:
    """One picture of each sample, decoded when it is asked for, and kept where `keep` says so."""

    def __init__(
        self, files: Sequence[bytes], decode: Callable[[int, bytes], np.ndarray], *, resolution: int, keep: bool
    ) -> None:
        self.files, self.resolution = files, resolution
        self._decode = decode  # number of the sample, its file -> (H, W, 3) uint8
        self._kept: np.ndarray | None = None  # (N, H, W, 3)
        if keep:  # else each picture is needed once before it is evicted
            self._kept = np.empty((len(files), resolution, resolution, 3), np.uint8)
        self._decoded = np.zeros(len(files), dtype=bool)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(len(file) for file in self.files) + (0 if self._kept is None else self._kept.nbytes)

    def fill(self, out: np.ndarray, where: np.ndarray, ordinals: np.ndarray) -> None:
        """Set out[where], uint8 (n, H, W, 3), to the pictures of the samples `ordinals`, (n,).

        Raises ShardError naming shard and sample if a picture can't be decoded.
        """
        if self._kept is None:
            for place, ordinal in zip(where, ordinals, strict=True):
                out[place] = self._decode(ordinal, self.files[ordinal])
            return
        for ordinal in ordinals[~self._decoded[ordinals]]:
            self._kept[ordinal] = self._decode(ordinal, self.files[ordinal])
            self._decoded[ordinal] = True
        out[where] = self._kept[ordinals]

    def first(self, count: int) -> np.ndarray:  # (count, H, W, 3) uint8
        """The pictures of the first samples. Raises ShardError."""
        out = np.empty((count, self.resolution, self.resolution, 3), np.uint8)
        self.fill(out, np.arange(count), np.arange(count))
        return out


class DecodedShard:
    """The samples of one split (None: of all) of a verified shard, in tar order; pictures are decoded when they are
    asked for, and kept if those of the whole set fit into CACHE_BYTES. `member` is what of a sample is its picture,
    `condition_member` what is its condition picture, where there is one.

    Raises ShardError on construction if the shard is not what the index says, or a sample lacks a member.
    """

    def __init__(
        self,
        index: ShardIndex,
        entry: ShardEntry,
        *,
        resolution: int,
        split: Split | None,
        member: Member = "image",
        condition_member: Member | None = None,
    ) -> None:
        stored = read_shard(index, entry, member=member, condition_member=condition_member)
        samples = [(sample, split_of(sample.key, index.holdout_fraction)) for sample in stored]
        self.samples: list[ShardSample] = [sample for sample, own in samples if split in (own, None)]
        self.splits: list[Split] = [own for _, own in samples if split in (own, None)]
        self.labels = np.array([sample.label for sample in self.samples], dtype=np.int64)  # (N,)
        self.text = encode_text(  # (N, L)
            tokenizer_of(index), [sample.caption for sample in self.samples], text_length=index.text.text_length
        )
        self.resolution, self.mask_values = resolution, index.mask_values
        self._url = index.url(entry.url)
        each = 3 * resolution**2 * (1 if condition_member is None else 2)
        how = {"resolution": resolution, "keep": index.samples * each <= CACHE_BYTES}
        self.image = Pictures([sample.picture for sample in self.samples], partial(self._decode, member), **how)
        self.condition: Pictures | None = None
        if condition_member is not None:
            files = [sample.condition or b"" for sample in self.samples]  # reading made sure that there is one
            self.condition = Pictures(files, partial(self._decode, condition_member), **how)

    @property
    def nbytes(self) -> int:
        """Bytes held by this shard."""
        return self.image.nbytes + (0 if self.condition is None else self.condition.nbytes)

    def _decode(self, member: Member, ordinal: int, file: bytes) -> np.ndarray:
        try:
            match member:
                case "image":
                    return load_picture(file, resolution=self.resolution)
                case "depth":
                    return load_depth(file, resolution=self.resolution)
                case "mask":
                    return load_mask(file, resolution=self.resolution, mask_values=self.mask_values)
        except Exception as error:
            said, key = "picture" if member == "image" else f"{member}.png", self.samples[ordinal].key
            raise ShardError(f"shard {self._url}, sample {key}: {said} can't be decoded: {error}") from error


class ShardCache:
    """The shards used last: at least a window of them, more while they fit in CACHE_BYTES."""

    def __init__(self) -> None:
        self._shards: OrderedDict[tuple[str, str, int, Member, Member | None, int], DecodedShard] = OrderedDict()

    def get(
        self,
        index: ShardIndex,
        entry: ShardEntry,
        *,
        resolution: int,
        member: Member = "image",
        condition_member: Member | None = None,
    ) -> DecodedShard:
        """The training split of a shard, read if it is not held. Raises ShardError."""
        key = (index.url(entry.url), entry.sha256, resolution, member, condition_member, index.mask_values)
        if key not in self._shards:
            how: dict[str, Any] = {"resolution": resolution, "member": member, "condition_member": condition_member}
            self._shards[key] = DecodedShard(index, entry, split="train", **how)
            self._evict()
        self._shards.move_to_end(key)
        return self._shards[key]

    def _evict(self) -> None:
        while len(self._shards) > WINDOW_SHARDS and sum(s.nbytes for s in self._shards.values()) > CACHE_BYTES:
            self._shards.popitem(last=False)


@cache
def shard_cache() -> ShardCache:
    """The cache of this process."""
    return ShardCache()


def tokenizer_of(index: ShardIndex) -> Tokenizer:
    """The set's caption tokenizer, verified; read once in a process. Raises ShardError."""
    return _tokenizer(index.model_copy(update={"shards": ()}))


@cache
def _tokenizer(header: ShardIndex) -> Tokenizer:
    return parse_bpe(read_bpe(header))
