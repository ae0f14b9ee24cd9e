"""A set of images with the work of frozen networks done beforehand: one tar for each tar, with arrays next to each
image, which may be smaller.

It is a set like any other, with the same samples in the same shards: so the order of training is the same, and whoever
reads images reads these.

Shapes: N samples of a shard, H = W = resolution.
"""

import hashlib
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np

from components.configuration.config import Config
from components.data.arrays import ArrayInfo, write_array
from components.data.decoded import DecodedShard
from components.data.images import load_image
from components.data.parts import sidecar
from components.data.shard_files import ShardJob, process_shards
from components.data.shards import ShardEntry, ShardIndex, fetch_shard, load_index, save_index, usable_groups
from components.data.tars import IMAGE_SUFFIXES, Group, write_shard
from components.execution import Resources
from components.sampling.image_files import encode_png
from components.sampling.model import most_at_once
from components.storage.store import Store, in_parallel

Rows = dict[str, np.ndarray]
Encode = Callable[[Rows], Rows]  # image uint8 (N, H, W, 3), label, text -> arrays (N, ...), each with its name


class EncodedPart(Config):
    """Sidecar of one shard."""

    entry: ShardEntry
    shapes: dict[str, tuple[int, ...]]  # of one sample's arrays


class SetEncoder:
    """Reads a shard, writes its tar and sidecar whole; that of the first shard writes the nulls too.

    Args:
        load_encode: called once; makes the function that is given batches of images; None: no arrays.
        resolution: of the images that it is given.
        kept_resolution: of the images that the new set holds.
    """

    def __init__(
        self,
        index: ShardIndex,
        load_encode: Callable[[], Encode] | None,
        files: Store,
        resolution: int,
        kept_resolution: int,
        first: int,
    ) -> None:
        self.index, self.files, self.resolution, self.kept = index, files, resolution, kept_resolution
        self.encode, self.first = None if load_encode is None else load_encode(), first

    def __call__(self, job: ShardJob) -> None:
        data = fetch_shard(self.index, job.shard)
        shard = DecodedShard(self.index, job.shard, resolution=self.resolution, split=None, data=data)
        made = self.arrays(shard)
        nulls = {name: column[0] for name, column in made.items() if name.startswith("null_")}
        arrays = {name: column for name, column in made.items() if name not in nulls}
        if job.number == self.first:
            for name, null in nulls.items():
                self.files.write(f"{name}.npy", write_array(null))
        groups = usable_groups(self.index, job.shard, data)
        tar = write_shard(
            self.sample(group, {name: column[number] for name, column in arrays.items()})
            for number, group in enumerate(groups)
        )
        url, sha256 = shard_name(job.number), hashlib.sha256(tar).hexdigest()
        changes = {"url": url, "bytes": len(tar), "sha256": sha256, "quarantined": ()}
        shapes = {name: column.shape[1:] for name, column in arrays.items()}
        self.files.write(url, tar)
        part = EncodedPart(entry=job.shard.model_copy(update=changes), shapes=shapes)
        self.files.write(job.name, part.model_dump_json().encode())

    def arrays(self, shard: DecodedShard) -> Rows:
        count = len(shard.samples)
        if self.encode is None or not count:
            return {}
        made, size = [], most_at_once(self.resolution)
        for start in range(0, count, size):
            chosen = np.arange(start, min(start + size, count))
            image = np.empty((len(chosen), self.resolution, self.resolution, 3), np.uint8)
            shard.image.fill(image, np.arange(len(chosen)), chosen)
            made.append(self.encode({"image": image, "label": shard.labels[chosen], "text": shard.text[chosen]}))
        return {name: np.concatenate([part[name] for part in made]) for name in made[0]}

    def sample(self, group: Group, arrays: Rows) -> dict[str, bytes | str]:
        """The members of a sample as they were, but for the image's size, and the arrays."""
        members: dict[str, bytes | str] = dict(group.members)
        if self.index.resolution != self.kept:
            assert group.image is not None  # or it were no sample
            members = {suffix: member for suffix, member in members.items() if suffix not in IMAGE_SUFFIXES}
            members["png"] = encode_png(load_image(group.image, resolution=self.kept))
        return {"__key__": group.key, **members, **{f"{name}.npy": write_array(row) for name, row in arrays.items()}}


def encode_set(
    index: ShardIndex,
    load_encode: Callable[[], Encode] | None,
    *,
    files: Store,
    resolution: int,
    kept_resolution: int,
    resources: Resources,
) -> Iterator[int]:
    """Write the tars of all shards that `files` lacks; yields how many there are after each. For the arguments see
    `SetEncoder`. Raises ShardError for a shard that its index does not match."""
    first = next((number for number, shard in enumerate(index.shards) if shard.samples), 0)
    header = index.model_copy(update={"shards": ()})
    make_encoder = partial(SetEncoder, header, load_encode, files, resolution, kept_resolution, first)
    return process_shards(make_encoder, index, part_names(index), files=files, resources=resources)


def commit_set(index: ShardIndex, files: Store, *, kept_resolution: int, made_by: dict[str, str]) -> ShardIndex:
    """Write the index of what `encode_set` has made of `index`, whose tokenizer must lie there already.

    Args:
        made_by: name of an array -> stage and key of the model that made it.
    """
    parts = [EncodedPart.model_validate_json(data) for data in in_parallel(files.read, part_names(index))]
    shapes = {name: shape for part in parts for name, shape in part.shapes.items()}
    changes = {
        "resolution": kept_resolution,
        "quarantined": 0,
        "arrays": tuple(ArrayInfo(name=name, shape=shapes[name], made_by=by) for name, by in made_by.items()),
        "shards": tuple(part.entry for part in parts),
    }
    save_index(files, index.model_copy(update=changes))
    return load_index(files.uri)


def part_names(index: ShardIndex) -> list[str]:
    return [sidecar(shard_name(number)) for number in range(len(index.shards))]


def shard_name(number: int) -> str:
    return f"shard-{number:06d}.tar"
