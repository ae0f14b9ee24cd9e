"""Sets of images to measure, described part by part.

A worker opens a part; no process holds a whole set.
Shapes: n images of a batch, H W their pixels.
"""

import io
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import count
from typing import NamedTuple, Protocol

import numpy as np
import torch
from einops import rearrange

from components.data.decoded import DecodedShard
from components.data.held_out import random_part
from components.data.shards import Member, ShardIndex, Split, View
from components.evaluation.metrics import Purpose
from components.models.diffusion.corruption import downsample
from components.runtime.storage.store import Digest, Store
from components.sampling.images import levels_to_uint8

BATCH = 32  # images in memory at a time
REFERENCE, HELD_OUT = "training images", "held-out images"  # names of sets
KNOWN: dict[Split, str] = {"holdout": HELD_OUT, "train": REFERENCE}


class ImagePart(Protocol):
    """Some images of a set; small and picklable. Features of the images are kept in their folder."""

    @property
    def num_images(self) -> int: ...

    @property
    def place(self) -> Store: ...  # the folder

    def batches(self) -> Iterator[np.ndarray]: ...  # uint8 (n, H, W, 3), at most BATCH images at a time


class ImageSet(NamedTuple):
    """Images to measure."""

    parts: tuple[ImagePart, ...]
    purpose: Purpose  # images of a model, or images that calibrate the distances

    @property
    def num_images(self) -> int:
        return sum(part.num_images for part in self.parts)

    def shrunk(self, side: int) -> "ImageSet":
        """The same images, averaged to a smaller side."""
        return self._replace(parts=tuple(SmallerImages(part, side) for part in self.parts))


class ShardImages(NamedTuple):
    """Samples from a single split of a single shard."""

    index: ShardIndex  # with this shard alone
    split: Split
    resolution: int  # pixels of a side after resizing
    rows: tuple[int, ...]  # numbers among the split's samples of this shard
    member: Member  # holds the images

    @property
    def num_images(self) -> int:
        return len(self.rows)

    @property
    def place(self) -> Store:
        return Store(self.index.root)

    def batches(self) -> Iterator[np.ndarray]:
        """Yields the chosen samples, resized to `resolution`. Raises ShardError."""
        (entry,) = self.index.shards
        view = View(self.resolution, self.member)
        shard = DecodedShard(self.index, entry, view, split=self.split)
        for rows in in_batches(np.array(self.rows, dtype=np.int64)):
            out = np.empty((len(rows), self.resolution, self.resolution, 3), np.uint8)
            shard.image.fill(out, np.arange(len(rows)), rows)
            yield out


class SmallerImages(NamedTuple):
    """Images of a smaller side: area-averaged, or a square window of each at a random place.
    Averages are the best that a base model could reach. In windows, the same in every run, details are compared at full
    size, where a whole image would be reduced to the input size of the feature network (patch FID; Chai et al., 2022,
    "Any-resolution Training for High-resolution Image Synthesis")."""

    images: ImagePart
    side: int  # at most that of the images
    window: tuple[int, int] | None = None  # seed of the set, and number of the part; None: averages

    @property
    def num_images(self) -> int:
        return self.images.num_images

    @property
    def place(self) -> Store:
        return self.images.place

    def batches(self) -> Iterator[np.ndarray]:
        """Yields the smaller images, uint8 (n, side, side, 3)."""
        generator, side = np.random.default_rng(self.window), self.side
        for images in self.images.batches():
            if self.window is None:
                yield shrink(images, side)
                continue
            corners = generator.integers(0, images.shape[1] - side + 1, (len(images), 2))
            pairs = zip(images, corners, strict=True)
            yield np.stack([image[y : y + side, x : x + side] for image, (y, x) in pairs])


class NoiseImages(NamedTuple):
    """Images of independent uniform pixels, like the output of an untrained model."""

    num_images: int
    resolution: int  # pixels of a side after resizing
    seed: tuple[int, int]  # of the set, and number of the part
    place: Store = Store("")  # beside the images that it is compared with

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
    array: str  # name; ends with a dot: the last array whose name begins so
    num_images: int
    digest: Digest | None = None  # None: not known

    @property
    def place(self) -> Store:
        return self.store.join(*self.path.split("/")[:-1])

    def batches(self) -> Iterator[np.ndarray]:
        """Yields the rows of the array in order. Raises DamagedFileError."""
        with np.load(io.BytesIO(self.store.read(self.path, expected=self.digest)), allow_pickle=False) as arrays:
            whole = not self.array.endswith(".")
            names = [name for name in arrays if name.startswith(self.array)]
            yield from in_batches(arrays[self.array if whole else names[-1]])


class MadeStage(NamedTuple):
    """Images of a generator's stage at the stage's own size, as parts to measure."""

    generator: str
    stage: str
    side: int  # H = W
    parts: tuple[ImagePart, ...]

    @property
    def name(self) -> str:
        """Name of the images in tables."""
        suffix = "" if self.stage == "model" else f": {self.stage.replace('_', ' ')}"
        return f"{branch_name(self.generator)}{suffix}, {self.side}²"


def branch_name(generator: str) -> str:
    """Name of a generator's images in tables."""
    return f"{generator.removesuffix('s')} branch"


def in_batches(rows: np.ndarray) -> Iterator[np.ndarray]:
    """Cuts rows into batches of at most BATCH."""
    return (rows[start : start + BATCH] for start in range(0, len(rows), BATCH))


def shrink(images: np.ndarray, side: int) -> np.ndarray:
    """Area-averaged uint8 (n, H, W, 3) -> (n, side, side, 3), rounded."""
    levels = rearrange(torch.from_numpy(images), "n h w c -> n c h w").float()
    return levels_to_uint8(downsample(levels, side))


def split_parts(
    index: ShardIndex, split: Split, *, resolution: int, limit: int | None = None, member: Member = "image"
) -> list[ShardImages]:
    """The first `limit` samples of a split in the order of the index, a part for each shard."""
    parts, left = [], index.samples if limit is None else limit
    for entry in index.shards:
        samples = entry.train_samples if split == "train" else entry.samples - entry.train_samples
        if taken := min(left, samples):
            alone = index.model_copy(update={"shards": (entry,)})
            parts.append(ShardImages(alone, split, resolution, tuple(range(taken)), member))
        left -= taken
    return parts


def trained_parts(
    index: ShardIndex, *, samples: int, seed: int, resolution: int, member: Member = "image"
) -> list[ShardImages]:
    """At most so many training images, of a random part of the set."""
    part = random_part(index, samples=samples, seed=seed)
    return split_parts(part, "train", resolution=resolution, limit=samples, member=member)


def held_out_parts(index: ShardIndex, *, resolution: int, limit: int, member: Member = "image") -> list[ShardImages]:
    """The first held-out samples; training samples where there are none, as in `held_out_arrays`."""
    wanted = partial(split_parts, index, resolution=resolution, limit=limit, member=member)
    return wanted("holdout") or wanted("train")


def some_of(parts: Sequence[ShardImages], chosen: np.ndarray) -> list[ShardImages]:
    """The images with the given ascending numbers (n,), counted over all parts."""
    first, some = 0, []
    for part in parts:
        own = chosen[(chosen >= first) & (chosen < first + part.num_images)] - first
        if len(own):
            some.append(part._replace(rows=tuple(part.rows[row] for row in own)))
        first += part.num_images
    return some


def images_at(parts: Sequence[ImagePart], numbers: Sequence[int]) -> list[np.ndarray]:
    """The images (H, W, 3) with the given numbers, counted over all parts; parts without any are not read."""
    first, found = 0, dict[int, np.ndarray]()
    for part in parts:
        inside = {number for number in numbers if first <= number < first + part.num_images}
        for start, images in zip(count(first, BATCH), part.batches() if inside else (), strict=False):
            found |= {number: images[number - start] for number in inside if start <= number < start + len(images)}
        first += part.num_images
    return [found[number] for number in numbers]


def compared_sets(
    trained: Sequence[ShardImages], held_out: Sequence[ShardImages], made: Sequence[MadeStage], *, seed: int
) -> dict[str, ImageSet]:
    """Sets to measure against training images: generated images, and sets that calibrate the numbers.
    Each stage is measured at its own size, so the base's images at, say, 16² are next to training images of 16².
    `held_out`: training images where none are held out; these are no set of their own."""
    side, place = trained[0].resolution, trained[0].place
    apart = tuple(part for part in held_out if part.split == "holdout")
    sets = {REFERENCE: ImageSet(tuple(trained), "scale"), HELD_OUT: ImageSet(apart, "scale")}
    counts = [sum(part.num_images for part in stage.parts) for stage in made]
    most = max(counts, default=sum(part.num_images for part in held_out))
    drawn = np.sort(np.random.default_rng(seed).permutation(sets[REFERENCE].num_images)[:most])
    for small in sorted({stage.side for stage in made if stage.side < side}):
        sets[f"{REFERENCE} shrunk to {small}²"] = ImageSet(tuple(some_of(trained, drawn)), "scale").shrunk(small)
    sizes = [min(4 * BATCH, most - start) for start in range(0, most, 4 * BATCH)]
    noise = [NoiseImages(size, side, (seed, number), place) for number, size in enumerate(sizes)]
    sets["noise"] = ImageSet(tuple(noise), "scale")
    return sets | {stage.name: ImageSet(stage.parts, "model") for stage in made}


def window_sets(
    sets: Mapping[str, ImageSet], made: Sequence[MadeStage], *, side: int, whole: int, seed: int
) -> dict[str, ImageSet]:
    """Windows of training images (the reference, first), held-out images, and generated images.
    Only generated images of the training images' side, `whole`, are cut: a window of others shows another part."""
    windows, names = {}, {f"{REFERENCE} of {whole}²": REFERENCE, HELD_OUT: HELD_OUT}
    names |= {stage.name: stage.name for stage in made if stage.side == whole}
    for name, given in names.items():
        images = sets[given]
        parts = [SmallerImages(part, side, (seed, n)) for n, part in enumerate(images.parts)]
        windows[f"windows of {side}² of {name}"] = images._replace(parts=tuple(parts))
    return windows
