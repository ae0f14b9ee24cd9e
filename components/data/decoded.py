"""Decoded shards, cached in the reading process: a small set is fetched and decoded once.

Shapes: N samples, n of them requested, H = W = resolution, L text_length.
"""

from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache, partial

import numpy as np
from tokenizers import Tokenizer

from components.data.images import load_depth, load_into, load_mask
from components.data.listing import ShardError
from components.data.order import WINDOW_SHARDS
from components.data.shards import (
    Member,
    ShardEntry,
    ShardIndex,
    ShardSample,
    Split,
    View,
    fetch_shard,
    parse_arrays,
    read_bpe,
    read_shard,
    split_of,
)
from components.sampling.image_files import encode_text, parse_bpe

CACHE_BYTES = 96 * 2**20  # of one reading process


class Images:
    """An image of each sample of a shard, decoded on request, and cached where `keep` is set.
    Raises ShardError naming shard and sample, here and below, for an image that can't be decoded."""

    def __init__(
        self,
        files: Sequence[bytes],
        keys: Sequence[str],
        url: str,
        *,
        member: Member,
        resolution: int,
        mask_values: int,
        keep: bool,
    ) -> None:
        self.files, self.keys, self.url, self.member = files, keys, url, member
        self.resolution, self.mask_values = resolution, mask_values
        self._kept: np.ndarray | None = None  # (N, H, W, 3)
        if keep:  # else each image is used once before its shard is dropped
            self._kept = np.empty((len(files), resolution, resolution, 3), np.uint8)
        self._decoded = np.zeros(len(files), dtype=bool)
        self.nbytes = sum(map(len, files)) + (0 if self._kept is None else self._kept.nbytes)  # held

    def fill(self, out: np.ndarray, where: np.ndarray, ordinals: np.ndarray) -> None:
        """Set out[where], uint8 (n, H, W, 3), to the images of the samples `ordinals`, (n,)."""
        if self._kept is None:
            for place, ordinal in zip(where, ordinals, strict=True):
                self._decode(out[place], ordinal)
            return
        for ordinal in ordinals[~self._decoded[ordinals]]:
            self._decode(self._kept[ordinal], ordinal)
            self._decoded[ordinal] = True
        out[where] = self._kept[ordinals]

    def first(self, count: int) -> np.ndarray:  # (count, H, W, 3) uint8
        """The images of the first samples."""
        out = np.empty((count, self.resolution, self.resolution, 3), np.uint8)
        self.fill(out, np.arange(count), np.arange(count))
        return out

    def _decode(self, out: np.ndarray, ordinal: int) -> None:
        """Set `out`, uint8 (H, W, 3), to the image of a sample."""
        file = self.files[ordinal]
        try:
            match self.member:
                case "image":
                    load_into(out, file)
                case "depth":
                    out[...] = load_depth(file, resolution=self.resolution)
                case "mask":
                    out[...] = load_mask(file, resolution=self.resolution, mask_values=self.mask_values)
        except Exception as error:
            name = "image" if self.member == "image" else f"{self.member}.png"
            where = f"shard {self.url}, sample {self.keys[ordinal]}"
            raise ShardError(f"{where}: {name} can't be decoded: {error}") from error


class DecodedShard:
    """The samples of a verified shard in tar order, images decoded on request.

    Images stay decoded if those of the whole set fit into CACHE_BYTES.

    Args:
        split: the split whose samples are read; None for all.
        data: the tar, if it has been fetched already.

    Raises ShardError on construction if the shard differs from the index, or a sample lacks a member.
    """

    def __init__(
        self, index: ShardIndex, entry: ShardEntry, view: View, *, split: Split | None, data: bytes | None = None
    ) -> None:
        self.url, self.array_infos = index.url(entry.url), {name: index.array(name) for name in view.arrays}
        stored = read_shard(index, entry, view, data=data)
        samples = [(sample, split_of(sample.key, index.holdout_fraction)) for sample in stored]
        self.samples: list[ShardSample] = [sample for sample, own in samples if split in (own, None)]
        self.splits: list[Split] = [own for _, own in samples if split in (own, None)]
        self.labels = np.array([sample.label for sample in self.samples], dtype=np.int64)  # (N,)
        captions = [sample.caption for sample in self.samples]
        self.text = encode_text(tokenizer_of(index), captions, text_length=index.text.text_length)  # (N, L)
        each = 3 * view.resolution**2 * (1 if view.condition_member is None else 2)
        images = partial(
            Images,
            keys=[sample.key for sample in self.samples],
            url=self.url,
            resolution=view.resolution,
            mask_values=index.mask_values,
            keep=index.samples * each <= CACHE_BYTES,
        )
        self.image = images([sample.image for sample in self.samples], member=view.member)
        self.condition: Images | None = None
        if view.condition_member is not None:
            files = [sample.condition or b"" for sample in self.samples]  # reading made sure that none lacks
            self.condition = images(files, member=view.condition_member)

    @property
    def nbytes(self) -> int:
        """Bytes held by the shard."""
        arrays = sum(len(file) for sample in self.samples for file in sample.arrays)
        return arrays + self.image.nbytes + (0 if self.condition is None else self.condition.nbytes)

    def fill(self, rows: dict[str, np.ndarray], where: np.ndarray, ordinals: np.ndarray) -> None:
        """Set rows[column][where] to the samples `ordinals`, (n,), in every column of a shard.
        Raises ShardError naming shard and sample for an image or an array that can't be read."""
        self.image.fill(rows["image"], where, ordinals)
        if self.condition is not None:
            self.condition.fill(rows["condition_image"], where, ordinals)
        for name, column in self.array_rows(ordinals).items():
            rows[name][where] = column
        rows["label"][where] = self.labels[ordinals]
        rows["text"][where] = self.text[ordinals]

    def array_rows(self, ordinals: np.ndarray) -> dict[str, np.ndarray]:
        """Arrays of the samples `ordinals`, (n,), by name, float16 (n, ...).
        Raises ShardError naming shard and sample."""
        chosen = [self.samples[ordinal] for ordinal in ordinals]
        return {
            name: parse_arrays(
                [(sample.key, sample.arrays[number]) for sample in chosen], info, f"shard {self.url}, {name}.npy"
            )
            for number, (name, info) in enumerate(self.array_infos.items())
        }


Key = tuple[str, str, View, int]


class ShardCache:
    """The shards used last and the shards fetched ahead, three at least.
    Three are the window that is read; there are more only while all fit into `capacity` bytes. So a reader of large
    shards holds three, however large, and a reader of small shards fetches the next window while it decodes the present
    one."""

    def __init__(self, capacity: int = CACHE_BYTES) -> None:
        self.capacity = capacity
        self._shards: OrderedDict[Key, DecodedShard] = OrderedDict()
        self._coming: dict[Key, tuple[int, Future[bytes]]] = {}  # bytes, and the verified tar
        self._needed: set[Key] = set()
        self._threads = ThreadPoolExecutor(WINDOW_SHARDS, thread_name_prefix="fetch-shard")

    @property
    def count(self) -> int:
        """Shards held or in transfer."""
        return len(self._shards) + len(self._coming)

    @property
    def nbytes(self) -> int:
        """Bytes held or in transfer."""
        return sum(s.nbytes for s in self._shards.values()) + sum(size for size, _ in self._coming.values())

    def fetch_ahead(
        self, index: ShardIndex, now: Sequence[ShardEntry], soon: Sequence[ShardEntry], *, view: View
    ) -> None:
        """Start to fetch the shards `now`, read next by the caller, and the shards `soon` if they fit in."""
        needed, keys = ([_key(index, entry, view) for entry in entries] for entries in (now, [*now, *soon]))
        self._needed = set(needed)
        self._coming = {key: coming for key, coming in self._coming.items() if key in keys}
        for key, entry in zip(keys, [*now, *soon], strict=True):
            if key in self._shards or key in self._coming or not entry.train_samples:
                continue
            keep = self._needed if key in self._needed else set(keys)
            if self._make_room(entry.bytes, keep) or key in self._needed:
                self._coming[key] = entry.bytes, self._threads.submit(fetch_shard, index, entry)

    def get(self, index: ShardIndex, entry: ShardEntry, *, view: View) -> DecodedShard:
        """The training split of a shard of the window passed to `fetch_ahead`. Raises ShardError."""
        key = _key(index, entry, view)
        if key not in self._shards:
            data = self._coming.pop(key)[1].result() if key in self._coming else None
            self._make_room(entry.bytes, self._needed)
            self._shards[key] = DecodedShard(index, entry, view, split="train", data=data)
        self._shards.move_to_end(key)
        return self._shards[key]

    def _make_room(self, size: int, keep: set[Key]) -> bool:
        """Drop shards, except `keep`, longest unused first, to make room for `size` bytes; False if in vain."""
        spare = [key for key in reversed(self._shards) if key not in keep]
        while not (room := self.count < WINDOW_SHARDS or self.nbytes + size <= self.capacity) and spare:
            del self._shards[spare.pop()]
        return room


def _key(index: ShardIndex, entry: ShardEntry, view: View) -> Key:
    return index.url(entry.url), entry.sha256, view, index.mask_values


shard_cache = cache(ShardCache)  # the cache of the calling process


def tokenizer_of(index: ShardIndex) -> Tokenizer:
    """The set's caption tokenizer, verified; read once in a process. Raises ShardError if it was changed."""
    return _tokenizer(index.header)


@cache
def _tokenizer(header: ShardIndex) -> Tokenizer:
    return parse_bpe(read_bpe(header))
