"""Sets of images to measure, described part by part.

A worker opens a part; no process holds a whole set.

Shapes: n images of a batch, H W their pixels.
"""

import io
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch
from einops import rearrange

from components.data.decoded import DecodedShard
from components.data.shards import ShardEntry, ShardIndex, Split
from components.models.diffusion.corruption import downsample
from components.runtime.storage.store import Digest, Store
from components.sampling.images import levels_to_uint8

BATCH = 32  # images in memory at a time
Purpose = Literal["model", "scale"]


class ImagePart(Protocol):
    """Some images of a set; small and picklable."""

    @property
    def num_images(self) -> int: ...

    def batches(self) -> Iterator[np.ndarray]:
        """Yields uint8 (n, H, W, 3), at most BATCH images at a time."""


class ImageSet(NamedTuple):
    """Images to measure."""

    parts: tuple[ImagePart, ...]
    purpose: Purpose  # images of a model, or images that calibrate the distances

    @property
    def num_images(self) -> int:
        """Number of images over all parts."""
        return sum(part.num_images for part in self.parts)


class ShardImages(NamedTuple):
    """Samples from a single split of a single shard."""

    index: ShardIndex  # with this shard alone
    split: Split
    resolution: int  # pixels of a side after resizing
    rows: tuple[int, ...]  # numbers among the split's samples of this shard

    @property
    def num_images(self) -> int:
        """Number of chosen samples."""
        return len(self.rows)

    def batches(self) -> Iterator[np.ndarray]:
        """Yields the chosen samples, resized to `resolution`. Raises ShardError."""
        (entry,) = self.index.shards
        shard = DecodedShard(self.index, entry, resolution=self.resolution, split=self.split)
        for rows in in_batches(np.array(self.rows, dtype=np.int64)):
            out = np.empty((len(rows), self.resolution, self.resolution, 3), np.uint8)
            shard.image.fill(out, np.arange(len(rows)), rows)
            yield out


class ShrunkImages(NamedTuple):
    """Images reduced to another size, the best that a base model could reach."""

    images: ShardImages
    side: int

    @property
    def num_images(self) -> int:
        """Number of images of the unreduced part."""
        return self.images.num_images

    def batches(self) -> Iterator[np.ndarray]:
        """Yields the images of the part, area-averaged to the side."""
        for images in self.images.batches():
            yield shrink(images, self.side)


class WindowImages(NamedTuple):
    """A square window of each image at a random place.

    Details are compared at full size, where a whole image would be reduced to the input size of the feature network
    (patch FID; Chai et al., 2022, "Any-resolution Training for High-resolution Image Synthesis").
    """

    images: ImagePart
    side: int  # of the windows, at most that of the images
    seed: tuple[int, int]  # of the set, and number of the part

    @property
    def num_images(self) -> int:
        """Number of images of the whole part: a window for each image."""
        return self.images.num_images

    def batches(self) -> Iterator[np.ndarray]:
        """Yields a window of each image, uint8 (n, side, side, 3), the same in every run."""
        generator, side = np.random.default_rng(self.seed), self.side
        for images in self.images.batches():
            corners = generator.integers(0, images.shape[1] - side + 1, (len(images), 2))
            yield np.stack([image[y : y + side, x : x + side] for image, (y, x) in zip(images, corners, strict=True)])


class NoiseImages(NamedTuple):
    """Images of independent uniform pixels, like the output of an untrained model."""

    num_images: int
    resolution: int
    seed: tuple[int, int]  # of the set, and number of the part

    def batches(self) -> Iterator[np.ndarray]:
        """Yields uniform noise, the same for the same seed."""
        generator = np.random.default_rng(self.seed)
        for rows in in_batches(np.arange(self.num_images)):
            shape = (len(rows), self.resolution, self.resolution, 3)
            yield generator.integers(0, 256, shape, dtype=np.uint8)


class FileImages(NamedTuple):
    """An array (N, H, W, 3) of an npz file in a store."""

    store: Store
    path: str
    array: str
    num_images: int
    digest: Digest | None = None  # None: not known

    def batches(self) -> Iterator[np.ndarray]:
        """Yields the rows of the array in order. Raises DamagedFileError."""
        with np.load(io.BytesIO(self.store.read(self.path, expected=self.digest)), allow_pickle=False) as arrays:
            yield from in_batches(arrays[self.array])


def in_batches(rows: np.ndarray) -> Iterator[np.ndarray]:
    """Cuts rows into batches of at most BATCH."""
    return (rows[start : start + BATCH] for start in range(0, len(rows), BATCH))


def split_parts(index: ShardIndex, split: Split, *, resolution: int, limit: int | None = None) -> list[ShardImages]:
    """The first `limit` samples of a split in the order of the index, a part for each shard."""
    parts, left = [], limit
    for entry in index.shards:
        count = samples_of(entry, split) if left is None else min(left, samples_of(entry, split))
        if count:
            alone = index.model_copy(update={"shards": (entry,)})
            parts.append(ShardImages(alone, split, resolution, tuple(range(count))))
        left = None if left is None else left - count
    return parts


def held_out_parts(index: ShardIndex, *, resolution: int, limit: int) -> list[ShardImages]:
    """The first held-out samples; training samples for a set without held-out images.

    Follows `held_out_arrays`.
    """
    held_out = split_parts(index, "holdout", resolution=resolution, limit=limit)
    return held_out or split_parts(index, "train", resolution=resolution, limit=limit)


def samples_of(entry: ShardEntry, split: Split) -> int:
    """Number of samples of the split in a shard."""
    return entry.train_samples if split == "train" else entry.samples - entry.train_samples


def spread(parts: Sequence[ShardImages], count: int, *, seed: int) -> list[ShardImages]:
    """Draws at most `count` images at random and keeps the order of the set."""
    total = sum(part.num_images for part in parts)
    return some_of(parts, np.sort(np.random.default_rng(seed).permutation(total)[:count]))


def some_of(parts: Sequence[ShardImages], chosen: np.ndarray) -> list[ShardImages]:
    """The images with the given ascending numbers (n,), counted over all parts."""
    first, found = 0, []
    for part in parts:
        own = chosen[(chosen >= first) & (chosen < first + part.num_images)] - first
        if len(own):
            found.append(part._replace(rows=tuple(part.rows[row] for row in own)))
        first += part.num_images
    return found


def noise_parts(count: int, *, resolution: int, seed: int) -> list[NoiseImages]:
    """`count` images of noise."""
    starts = range(0, count, 4 * BATCH)
    return [
        NoiseImages(min(4 * BATCH, count - start), resolution, (seed, number)) for number, start in enumerate(starts)
    ]


def shrink(images: np.ndarray, side: int) -> np.ndarray:
    """Area-averaged uint8 (n, H, W, 3) -> (n, side, side, 3), rounded."""
    levels = rearrange(torch.from_numpy(images), "n h w c -> n c h w").float()
    return levels_to_uint8(downsample(levels, side))
