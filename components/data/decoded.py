"""Decoded shards, cached in the reading process: a small set is fetched and decoded once.

Shapes: N samples, n of them requested, H = W = resolution, L text_length.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import ClassVar

import numpy as np
from tokenizers import Tokenizer

from components.data import shards
from components.data.images import Degradation, degrade, load_depth, load_into, load_mask
from components.data.listing import ShardError
from components.data.shards import Member, ShardEntry, ShardIndex, Split, View
from components.runtime.storage.model_table import column_of
from components.sampling.image_files import encode_text

CACHE_BYTES = 96 * 2**20  # of one reading process


@dataclass
class Images:
    """An image of each sample of a shard, decoded on request.
    Raises ShardError naming shard and sample, here and below, for an image that can't be decoded."""

    files: Sequence[bytes]
    keys: Sequence[str]
    url: str
    member: Member
    resolution: int
    mask_values: int
    keep: bool  # what is decoded, as images are used again

    def __post_init__(self) -> None:
        count, side = len(self.files), self.resolution
        self._kept = np.empty((count, side, side, 3), np.uint8) if self.keep else None
        self._decoded = np.zeros(count, dtype=bool)
        self.nbytes = sum(map(len, self.files)) + (0 if self._kept is None else self._kept.nbytes)  # held

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

    def _decode(self, out: np.ndarray, ordinal: int) -> None:
        """Set `out`, uint8 (H, W, 3), to the image of a sample."""
        file = self.files[ordinal]
        try:
            if self.member == "image":
                load_into(out, file)
            elif self.member == "depth":
                out[...] = load_depth(file, resolution=self.resolution)
            else:
                out[...] = load_mask(file, resolution=self.resolution, mask_values=self.mask_values)
        except Exception as error:
            name = "image" if self.member == "image" else f"{self.member}.png"
            where = f"shard {self.url}, sample {self.keys[ordinal]}"
            raise ShardError(f"{where}: {name} can't be decoded: {error}") from error


class DecodedShard:
    """The samples of a verified shard in tar order, images decoded on request.
    Images stay decoded if those of the whole set fit into CACHE_BYTES. `split`: whose samples are read; None: all.
    `data`: the tar, if it has been fetched already. Raises ShardError on construction if the shard differs from the
    index, or a sample lacks a member."""

    def __init__(
        self, index: ShardIndex, entry: ShardEntry, view: View, *, split: Split | None, data: bytes | None = None
    ) -> None:
        self.url, self.array_infos = index.url(entry.url), {name: index.array(name) for name in view.arrays}
        stored = shards.read_shard(index, entry, view, data=data)
        samples = [(sample, shards.split_of(sample.key, index.holdout_fraction)) for sample in stored]
        self.samples = [sample for sample, own in samples if split in (own, None)]
        self.splits: list[Split] = [own for _, own in samples if split in (own, None)]
        self.labels = np.array([sample.label for sample in self.samples], dtype=np.int64)  # (N,)
        captions = [sample.caption for sample in self.samples]
        self.text = encode_text(tokenizer_of(index.header), captions, text_length=index.text.text_length)  # (N, L)
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
        arrays = sum(len(file) for sample in self.samples for file in sample.arrays)
        return arrays + self.image.nbytes + (0 if self.condition is None else self.condition.nbytes)

    def fill(self, rows: dict[str, np.ndarray], where: np.ndarray, ordinals: np.ndarray) -> None:
        """Set rows[column][where] to the samples `ordinals`, (n,), in every column of a shard.
        Raises ShardError naming shard and sample for an image or an array that can't be read."""
        self.image.fill(rows["image"], where, ordinals)
        if self.condition is not None:
            self.condition.fill(rows["condition_image"], where, ordinals)
        for number, (name, info) in enumerate(self.array_infos.items()):
            files = [(self.samples[ordinal].key, self.samples[ordinal].arrays[number]) for ordinal in ordinals]
            rows[name][where] = shards.parse_arrays(files, info, f"shard {self.url}, {name}.npy")
        rows["label"][where] = self.labels[ordinals]
        rows["text"][where] = self.text[ordinals]


@dataclass(frozen=True)
class ImageSamples:
    """The training samples of a set of images. Raises ValueError for two condition images.
    Columns: `image` uint8 (n, H, W, 3), `label` int64 (n,), `text` int64 (n, L), `position` int64 (n,); with a
    condition member or a degradation also `condition_image` uint8 (n, H, W, 3), with a degradation `task` int64 (n,);
    arrays of the set are float16 under their names."""

    decoded: ClassVar[bool] = False

    index: ShardIndex
    view: View
    degradation: Degradation | None = None  # makes the `condition_image` of the `image`

    def __post_init__(self) -> None:
        if self.view.condition_member is not None and self.degradation is not None:
            member = self.view.condition_member
            raise ValueError(f"condition_image is either {member} or a degraded image, not both")

    @property
    def counts(self) -> np.ndarray:  # int64 (S,)
        return column_of(self.index.shards, "train_samples")

    def empty(self, rows: int) -> dict[str, np.ndarray]:
        view, shape = self.view, (rows, self.view.resolution, self.view.resolution, 3)
        columns: dict[str, np.ndarray] = {
            "image": np.empty(shape, np.uint8),
            "label": np.zeros(rows, np.int64),
            "text": np.zeros((rows, self.index.text.text_length), np.int64),
            "position": np.zeros(rows, np.int64),
        }
        if view.condition_member is not None or self.degradation is not None:
            columns["condition_image"] = np.empty(shape, np.uint8)
        if self.degradation is not None:
            columns["task"] = np.zeros(rows, np.int64)
        return columns | {name: np.zeros((rows, *self.index.array(name).shape), np.float16) for name in view.arrays}

    def open(self, shard: int) -> DecodedShard:
        """The training samples of a shard. Raises ShardError."""
        return DecodedShard(self.index, self.index.shards[shard], self.view, split="train")

    def complete(self, rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The rows with their degraded images."""
        if self.degradation is None:
            return rows
        return rows | degrade(rows["image"], rows["position"], self.degradation)


@cache
def tokenizer_of(header: ShardIndex) -> Tokenizer:
    """A set's caption tokenizer, verified; read once in a process. Raises ShardError if it was changed."""
    return Tokenizer.from_str(shards.read_bpe(header))
