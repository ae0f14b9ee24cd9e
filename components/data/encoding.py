"""Sets made by frozen networks, a file for each shard: tokens, or images with arrays next to them.

The workers of a `Pool` hold a network each and take a shard at a time: threads decode the next batch of images while
the network is at one, and write a file while the next shard is read. An encoded set has one tar for each tar, with
images that may be smaller, and the same samples: so the order of training is the same.

Shapes: N samples of a shard, n of a batch, H = W = resolution, T tokens an image.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from einops import rearrange

from components.configuration.optimization import Precision
from components.data import shards
from components.data.decoded import DecodedShard
from components.data.images import load_image
from components.data.parts import part_name
from components.data.shards import ArrayInfo, Member, ShardEntry, ShardIndex, View
from components.data.tars import IMAGE_SUFFIXES, Group, write_shard
from components.data.tokens import TokenSet, describe_tokens, write_tokens
from components.models.autoencoder import Autoencoder
from components.models.bundle import DESCRIPTION, ModelBundle, describe_bundle, load_bundle
from components.runtime.pool import Later
from components.runtime.storage.artifact import Artifact, Record, write_file, write_record
from components.runtime.storage.model_table import column_of
from components.runtime.storage.store import Store
from components.sampling.device import best_device, sampling_in
from components.sampling.image_files import encode_png
from components.sampling.images import from_uint8
from components.sampling.model import most_at_once


class ShardJob(NamedTuple):
    """A shard to be processed."""

    number: int  # in the order of the index
    name: str  # of the part to write
    shard: ShardEntry


def shard_jobs(index: ShardIndex, names: Sequence[str]) -> list[ShardJob]:
    """A job for each shard, with the name of the part."""
    return [ShardJob(*job) for job in zip(range(len(names)), names, index.shards, strict=True)]


def decoded_batches(shard: DecodedShard, *, threads: int) -> Iterator[np.ndarray]:
    """Yields all images of a shard, uint8 (n, H, W, 3), as many as fit into a network's memory.
    `threads` decode the next batch in the meantime. Raises ShardError for an image that can't be decoded."""
    side, count = shard.image.resolution, len(shard.samples)
    size = most_at_once(side)
    with ThreadPoolExecutor(threads) as decoders:

        def decode(first: int) -> tuple[np.ndarray, list[Future[None]]]:
            chosen = np.arange(first, min(first + size, count))
            image = np.empty((len(chosen), side, side, 3), np.uint8)
            cut = np.array_split(chosen, threads)
            return image, [decoders.submit(shard.image.fill, image, part - first, part) for part in cut]

        batches = map(decode, range(0, count, size))
        coming = next(batches, None)
        while coming is not None:
            image, parts = coming
            coming = next(batches, None)
            for part in parts:
                part.result()
            yield image


Rows = dict[str, np.ndarray]
Encode = Callable[[Rows], Rows]  # image uint8 (N, H, W, 3), label, text -> arrays (N, ...) by name


@dataclass
class SetEncoder:
    """A worker of the pool: reads a shard, writes the encoded tar and a record."""

    index: ShardIndex
    load_encode: Callable[[], Encode] | None  # None: no arrays
    files: Store
    _: KW_ONLY
    resolution: int  # of the images passed to that function
    kept_resolution: int  # of the images in the new set
    first: int  # the shard with the nulls, arrays of an absent condition
    threads: int  # that decode
    precision: Precision  # of the networks

    def __post_init__(self) -> None:
        self.encode = None if self.load_encode is None else self.load_encode()

    def __call__(self, job: ShardJob) -> Later:
        data = shards.fetch_shard(self.index, job.shard)
        shard = DecodedShard(self.index, job.shard, View(self.resolution), split=None, data=data)
        return Later(partial(self.write, job, data, self.arrays(shard)))

    def write(self, job: ShardJob, data: bytes, columns: Rows) -> None:
        """Writes the tar of a shard, of the shard's bytes and the arrays, and a record."""
        nulls = {name: column[0] for name, column in columns.items() if name.startswith("null_")}
        arrays = {name: column for name, column in columns.items() if name not in nulls}
        files = []
        if job.number == self.first:
            files += [write_file(self.files, f"{name}.npy", shards.write_array(null)) for name, null in nulls.items()]
        tar = write_shard(
            self.sample(group, {name: column[number] for name, column in arrays.items()})
            for number, group in enumerate(shards.usable_groups(self.index, job.shard, data))
        )
        tar_file = write_file(self.files, f"{job.name}.tar", tar)
        entry = job.shard.model_copy(update={"url": tar_file.path, **tar_file.digest._asdict(), "quarantined": ()})
        shapes = {name: column.shape[1:] for name, column in arrays.items()}
        write_record(self.files, job.name, tar_file, *files, entry=entry.model_dump(), shapes=shapes)

    def arrays(self, shard: DecodedShard) -> Rows:
        """The arrays of a shard's samples, (N, ...) by name, encoded in parts that fit into memory."""
        if self.encode is None or not shard.samples:
            return {}
        parts, first = [], 0
        with sampling_in(self.precision, best_device()):
            for image in decoded_batches(shard, threads=self.threads):
                own = slice(first, first := first + len(image))
                parts.append(self.encode({"image": image, "label": shard.labels[own], "text": shard.text[own]}))
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def sample(self, group: Group, arrays: Rows) -> dict[str, bytes | str]:
        """The members of a sample, with the image in the kept resolution, and the arrays."""
        members: dict[str, bytes | str] = dict(group.members)
        if self.index.resolution != self.kept_resolution:
            assert group.image is not None  # every usable group has an image
            members = {suffix: member for suffix, member in members.items() if suffix not in IMAGE_SUFFIXES}
            members["png"] = encode_png(load_image(group.image, resolution=self.kept_resolution))
        encoded = {f"{name}.npy": shards.write_array(row) for name, row in arrays.items()}
        return {"__key__": group.key, **members, **encoded}


def set_encoder(index: ShardIndex, load_encode: Callable[[], Encode] | None, **how: Any) -> Callable[[], SetEncoder]:
    """Maker of the workers for a set, picklable; for the arguments see `SetEncoder`."""
    first = next((number for number, shard in enumerate(index.shards) if shard.samples), 0)
    return partial(SetEncoder, index.header, load_encode, first=first, **how)


def commit_set(
    index: ShardIndex, records: Sequence[Record], files: Store, *, kept_resolution: int, made_by: dict[str, str]
) -> ShardIndex:
    """Write the index of the encoded set of `index`; the caption tokenizer must lie in `files` already.
    `records`: of the parts, in the order of the index. `made_by`: name of an array -> stage and key of its model."""
    shapes = {name: shape for record in records for name, shape in record.facts["shapes"].items()}
    changes = {
        "resolution": kept_resolution,
        "quarantined": 0,
        "arrays": tuple(ArrayInfo(name=name, shape=shapes[name], made_by=by) for name, by in made_by.items()),
        "shards": tuple(ShardEntry.model_validate(record.facts["entry"]) for record in records),
    }
    shards.save_index(files, index.model_copy(update=changes))
    return shards.load_index(files.uri)


def part_names(index: ShardIndex) -> list[str]:
    """Names of the parts, numbered in the order of the index."""
    return list(map(part_name, range(len(index.shards))))


def open_autoencoder(artifact: Artifact) -> Autoencoder:
    """Loads the trained network, for a worker. Raises ValueError for a model of another kind."""
    with artifact.local_copy() as folder:
        return _checked(load_bundle(folder)).requires_grad_(False)


def describe_autoencoder(artifact: Artifact) -> Autoencoder:
    """Builds the network on the meta device, without weights, for the head.
    Raises ValueError for a model of another kind."""
    return _checked(describe_bundle(artifact.read(DESCRIPTION)))


def _checked(bundle: ModelBundle) -> Autoencoder:
    if not isinstance(bundle.module, Autoencoder):
        raise ValueError(f"an autoencoder is needed, not a model of kind {bundle.kind}")
    return bundle.module


@dataclass
class TokenEncoder:
    """A worker of the pool: reads a shard of images and writes the token file whole."""

    index: ShardIndex
    tokenizer: Artifact
    files: Store
    _: KW_ONLY
    member: Member = "image"  # of each sample, the image that is encoded
    threads: int = 2  # that decode
    precision: Precision = "fp32"  # of the network

    def __post_init__(self) -> None:
        self.device, self.network = best_device(), open_autoencoder(self.tokenizer)
        self.network.to(self.device, memory_format=torch.channels_last)  # pyrefly: ignore[no-matching-overload]

    def __call__(self, job: ShardJob) -> Later:
        shard = DecodedShard(self.index, job.shard, View(self.network.resolution, self.member), split=None)
        tokens = [np.zeros((0, math.prod(self.network.grid)), np.int32)]
        with sampling_in(self.precision, self.device):
            for image in decoded_batches(shard, threads=self.threads):
                codes = self.network.tokenize(from_uint8(torch.from_numpy(image).to(self.device)))
                tokens.append(rearrange(codes, "n h w -> n (h w)").cpu().numpy())
        keys, split = tuple(sample.key for sample in shard.samples), np.array(shard.splits, dtype=str)
        samples = TokenSet(keys, np.concatenate(tokens), shard.labels, shard.text, split)
        return Later(partial(self.write, job.name, samples))

    def write(self, name: str, samples: TokenSet) -> None:
        """Writes the file of a shard's samples, and a record."""
        file = write_file(self.files, name, write_tokens(samples))
        write_record(self.files, name, file, tokens=describe_tokens(samples, name).model_dump())


def token_names(index: ShardIndex) -> list[str]:
    """File names with the stems of the shards, numbered: two folders may hold tars of the same name."""
    names = [url.rpartition("/")[2] for url in column_of(index.shards, "url")]
    stems = [name.partition(".")[0] for name in names]
    return [f"{number:06d}-{stem}.parquet" for number, stem in enumerate(stems)]
