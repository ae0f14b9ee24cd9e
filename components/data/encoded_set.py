"""Encoded sets: the outputs of frozen networks as arrays next to each image, made before training.

One tar for each tar, with images that may be smaller. An encoded set is a set like any other, with the same samples in
the same shards: so the order of training is the same, and every reader of images reads an encoded set too.

Shapes: N samples of a shard, H = W = resolution.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np

from components.data.decoded import DecodedShard
from components.data.images import load_image
from components.data.pieces import WARN, Warn
from components.data.shard_files import ShardJob, process_shards
from components.data.shards import (
    ArrayInfo,
    ShardEntry,
    ShardIndex,
    fetch_shard,
    load_index,
    save_index,
    usable_groups,
    write_array,
)
from components.data.tars import IMAGE_SUFFIXES, Group, write_shard
from components.runtime.execution import Resources
from components.runtime.storage.kept_parts import Record, write_file, write_record
from components.runtime.storage.store import Store
from components.sampling.image_files import encode_png
from components.sampling.model import most_at_once

Rows = dict[str, np.ndarray]
Encode = Callable[[Rows], Rows]  # image uint8 (N, H, W, 3), label, text -> arrays (N, ...), each with its name


class SetEncoder:
    """A worker of the pool: reads a shard, writes the encoded tar and a record.

    The shard number `first` also writes the nulls, arrays of an absent condition.

    Args:
        load_encode: called once; makes the function that encodes batches of images; None: no arrays.
        resolution: of the images passed to that function.
        kept_resolution: of the images in the new set.
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
        columns = self.arrays(shard)
        nulls = {name: column[0] for name, column in columns.items() if name.startswith("null_")}
        arrays = {name: column for name, column in columns.items() if name not in nulls}
        files = []
        if job.number == self.first:
            files += [write_file(self.files, f"{name}.npy", write_array(null)) for name, null in nulls.items()]
        groups = usable_groups(self.index, job.shard, data)
        tar = write_shard(
            self.sample(group, {name: column[number] for name, column in arrays.items()})
            for number, group in enumerate(groups)
        )
        tar_file = write_file(self.files, f"{job.name}.tar", tar)
        changes = {"url": tar_file.path, **tar_file.digest._asdict(), "quarantined": ()}
        entry = job.shard.model_copy(update=changes)
        shapes = {name: column.shape[1:] for name, column in arrays.items()}
        write_record(self.files, job.name, tar_file, *files, entry=entry.model_dump(), shapes=shapes)

    def arrays(self, shard: DecodedShard) -> Rows:
        """The arrays of a shard's samples, (N, ...) by name, encoded in parts that fit into memory."""
        count = len(shard.samples)
        if self.encode is None or not count:
            return {}
        parts, size = [], most_at_once(self.resolution)
        for start in range(0, count, size):
            chosen = np.arange(start, min(start + size, count))
            image = np.empty((len(chosen), self.resolution, self.resolution, 3), np.uint8)
            shard.image.fill(image, np.arange(len(chosen)), chosen)
            parts.append(self.encode({"image": image, "label": shard.labels[chosen], "text": shard.text[chosen]}))
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def sample(self, group: Group, arrays: Rows) -> dict[str, bytes | str]:
        """The members of a sample, with the image in the kept resolution, and the arrays."""
        members: dict[str, bytes | str] = dict(group.members)
        if self.index.resolution != self.kept:
            assert group.image is not None  # every usable group has an image
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
    warn: Warn = WARN,
) -> Iterator[int]:
    """Write the missing tars of an encoded set; yields the number of tars after each.

    For the arguments see `SetEncoder` and `process_shards`. Raises ShardError for a shard that differs from the index.
    """
    first = next((number for number, shard in enumerate(index.shards) if shard.samples), 0)
    header = index.model_copy(update={"shards": ()})
    make_encoder = partial(SetEncoder, header, load_encode, files, resolution, kept_resolution, first)
    return process_shards(make_encoder, index, part_names(index), files=files, resources=resources, warn=warn)


def commit_set(
    index: ShardIndex, records: Sequence[Record], files: Store, *, kept_resolution: int, made_by: dict[str, str]
) -> ShardIndex:
    """Write the index of the encoded set of `index`; the caption tokenizer must lie in `files` already.

    Args:
        records: of the parts, in the order of the index.
        made_by: name of an array -> stage and key of the model that made it.
    """
    shapes = {name: shape for record in records for name, shape in record.facts["shapes"].items()}
    changes = {
        "resolution": kept_resolution,
        "quarantined": 0,
        "arrays": tuple(ArrayInfo(name=name, shape=shapes[name], made_by=by) for name, by in made_by.items()),
        "shards": tuple(ShardEntry.model_validate(record.facts["entry"]) for record in records),
    }
    save_index(files, index.model_copy(update=changes))
    return load_index(files.uri)


def part_names(index: ShardIndex) -> list[str]:
    """Names of the parts, numbered in the order of the index."""
    return [f"shard-{number:06d}" for number in range(len(index.shards))]
