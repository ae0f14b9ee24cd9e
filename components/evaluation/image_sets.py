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
REFERENCE, HELD_OUT = "training images", "held-out images"  # names of sets


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


class MadeStage(NamedTuple):
    """Images of a generator's stage at the stage's own size, as parts to measure."""

    generator: str
    stage: str
    side: int  # H = W
    parts: tuple[ImagePart, ...]


def branch_name(generator: str) -> str:
    """Name of a generator's images in tables."""
    return f"{generator.removesuffix('s')} branch"


def compared_sets(
    trained: Sequence[ShardImages], held_out: Sequence[ShardImages], made: Sequence[MadeStage], *, seed: int
) -> dict[str, ImageSet]:
    """Sets to measure against training images: generated images, and sets that calibrate the numbers.

    Each stage is measured at its own size, so the base's images at, say, 16² are next to training images of 16².
    """
    side = trained[0].resolution
    sets = {REFERENCE: ImageSet(tuple(trained), "scale"), HELD_OUT: ImageSet(tuple(held_out), "scale")}
    counts = [ImageSet(stage.parts, "model").num_images for stage in made]
    count = max(counts, default=sets[HELD_OUT].num_images)
    for small in sorted({stage.side for stage in made if stage.side < side}):
        parts = tuple(ShrunkImages(part, small) for part in spread(trained, count, seed=seed))
        sets[f"{REFERENCE} shrunk to {small}²"] = ImageSet(parts, "scale")
    sets["noise"] = ImageSet(tuple(noise_parts(count, resolution=side, seed=seed)), "scale")
    return sets | {made_name(stage): ImageSet(stage.parts, "model") for stage in made}


def made_name(stage: MadeStage) -> str:
    """Name of a stage's images in tables."""
    suffix = "" if stage.stage == "model" else f": {stage.stage.replace('_', ' ')}"
    return f"{branch_name(stage.generator)}{suffix}, {stage.side}²"


def window_sets(
    trained: Sequence[ShardImages], held_out: Sequence[ShardImages], made: Sequence[MadeStage], *, side: int, seed: int
) -> dict[str, ImageSet]:
    """Windows of training images (the reference, first), held-out images, and generated images.

    Only generated images larger than a window are cut.
    """
    wholes = {f"{REFERENCE} of {trained[0].resolution}²": ImageSet(tuple(trained), "scale")}
    wholes[HELD_OUT] = ImageSet(tuple(held_out), "scale")
    wholes |= {made_name(stage): ImageSet(stage.parts, "model") for stage in made if stage.side > side}
    return {
        f"windows of {side}² of {name}": ImageSet(
            tuple(WindowImages(part, side, (seed, number)) for number, part in enumerate(whole.parts)), whole.purpose
        )
        for name, whole in wholes.items()
    }
