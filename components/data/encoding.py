"""Sets made by frozen networks, a file for each shard: tokens, or images with arrays next to them.

An actor pool of Ray Data holds a network in each actor. Parts have fixed names, numbered in the order of the index: a
whole part of any earlier try is not made again. An encoded set has one tar for each tar, with images that may be
smaller. It is a set like any other, with the same samples in the same shards: so the order of training is the same, and
every reader of images reads it too.

Shapes: N samples of a shard, H = W = resolution, T tokens an image.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import ray.data
import torch
from einops import rearrange

from components.data.decoded import DecodedShard
from components.data.held_out import read_whole_shard
from components.data.images import load_image
from components.data.parts import WARN, Warn, part_name, whole_parts
from components.data.shards import (
    ArrayInfo,
    Member,
    ShardEntry,
    ShardIndex,
    View,
    fetch_shard,
    load_index,
    save_index,
    usable_groups,
    write_array,
)
from components.data.tars import IMAGE_SUFFIXES, Group, write_shard
from components.data.tokens import TokenSet, describe_tokens, write_tokens
from components.models.autoencoder import Autoencoder
from components.models.bundle import DESCRIPTION, ModelBundle, describe_bundle, load_bundle
from components.runtime.execution import Resources, node_threads
from components.runtime.pool import portable
from components.runtime.storage.artifact import Artifact, Record, write_file, write_part, write_record
from components.runtime.storage.store import Store
from components.sampling.device import best_device, state_products
from components.sampling.image_files import encode_png
from components.sampling.images import from_uint8
from components.sampling.model import most_at_once


class ShardJob(NamedTuple):
    """A shard to be processed."""

    number: int  # in the order of the index
    name: str  # of the part to write
    shard: ShardEntry


Worker = Callable[[ShardJob], None]  # reads the shard, writes the files of the part, and its record last


def process_shards(
    make_worker: Callable[[], Worker],
    index: ShardIndex,
    names: list[str],
    *,
    files: Store,
    resources: Resources,
    warn: Warn = WARN,
) -> Iterator[int]:
    """Write the parts that `files` does not hold whole; yields the number of parts after each.

    Args:
        make_worker: picklable; called in each actor before its first shard, in at most resources.num_actors.
        names: of the parts, one for each shard.
        warn: receives a line for each damaged file of an earlier try.

    Raises ShardError for a shard that differs from the index.
    """
    whole = whole_parts(dict.fromkeys(names, ""), files=files, num_cpus=resources.cpus_per_core, warn=warn)
    jobs = [ShardJob(*job) for job in zip(range(len(names)), names, index.shards, strict=True) if job[1] not in whole]
    yield (done := len(names) - len(jobs))
    for _ in _finished(make_worker, jobs, resources) if jobs else ():
        yield (done := done + 1)


class PoolActor:
    """An actor of the pool. Jobs come as rows of text: Ray Data's blocks hold no objects of ours."""

    def __init__(self, make_worker: Callable[[], Worker], resources: Resources) -> None:
        torch.set_num_threads(node_threads(resources))
        state_products("fp32")
        self.make_worker = make_worker
        self.work: Worker | None = None

    def __call__(self, row: dict[str, Any]) -> dict[str, str]:
        if self.work is None:  # not before the first shard: Ray Data kills actors that still start when all is done
            self.work = self.make_worker()
        self.work(ShardJob(row["number"], row["name"], ShardEntry.model_validate_json(row["shard"])))
        return {"name": row["name"]}


def _finished(
    make_worker: Callable[[], Worker], jobs: list[ShardJob], resources: Resources
) -> Iterator[dict[str, Any]]:
    portable(make_worker, what="what encodes shards")
    rows = [job._asdict() | {"shard": job.shard.model_dump_json()} for job in jobs]
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
        PoolActor,
        fn_constructor_args=(make_worker, resources),
        compute=ray.data.ActorPoolStrategy(size=min(resources.num_actors, len(rows))),
        num_cpus=resources.cpus_per_worker,
        num_gpus=resources.gpus_per_worker,
    )
    dataset.context.enable_progress_bars = dataset.context.print_on_execution_start = False
    return dataset.iter_rows()


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
        shard = DecodedShard(self.index, job.shard, View(self.resolution), split=None, data=data)
        columns = self.arrays(shard)
        nulls = {name: column[0] for name, column in columns.items() if name.startswith("null_")}
        arrays = {name: column for name, column in columns.items() if name not in nulls}
        files = []
        if job.number == self.first:
            files += [write_file(self.files, f"{name}.npy", write_array(null)) for name, null in nulls.items()]
        tar = write_shard(
            self.sample(group, {name: column[number] for name, column in arrays.items()})
            for number, group in enumerate(usable_groups(self.index, job.shard, data))
        )
        tar_file = write_file(self.files, f"{job.name}.tar", tar)
        entry = job.shard.model_copy(update={"url": tar_file.path, **tar_file.digest._asdict(), "quarantined": ()})
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
    For the arguments see `SetEncoder` and `process_shards`. Raises ShardError for a shard that differs from the
    index."""
    first = next((number for number, shard in enumerate(index.shards) if shard.samples), 0)
    make_encoder = partial(SetEncoder, index.header, load_encode, files, resolution, kept_resolution, first)
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


class TokenEncoder:
    """A worker of the pool: reads a shard of images and writes the token file whole."""

    def __init__(self, index: ShardIndex, tokenizer: Artifact, files: Store, member: Member) -> None:
        self.index, self.files, self.member = index, files, member
        self.device = best_device()
        self.network = open_autoencoder(tokenizer)
        self.network.to(self.device, memory_format=torch.channels_last)  # pyrefly: ignore[no-matching-overload]

    def __call__(self, job: ShardJob) -> None:
        samples = read_whole_shard(self.index, job.shard, View(self.network.resolution, self.member))
        size = most_at_once(self.network.resolution)
        parts = []
        for start in range(0, len(samples.key), size):
            image = from_uint8(torch.from_numpy(samples.image[start : start + size]).to(self.device))
            parts.append(rearrange(self.network.tokenize(image), "n h w -> n (h w)").cpu().numpy())
        split = np.array(samples.split, dtype=str)
        tokens = TokenSet(samples.key, np.concatenate(parts), samples.label, samples.text, split)
        facts = describe_tokens(tokens, job.name).model_dump()
        write_part(self.files, job.name, job.name, write_tokens(tokens), tokens=facts)


def token_names(index: ShardIndex) -> list[str]:
    """File names with the stems of the shards, numbered: two folders may hold tars of the same name."""
    stems = [shard.url.rpartition("/")[2].partition(".")[0] for shard in index.shards]
    return [f"{number:06d}-{stem}.parquet" for number, stem in enumerate(stems)]


def encode_shards(
    index: ShardIndex,
    tokenizer: Artifact,
    *,
    files: Store,
    resources: Resources,
    member: Member = "image",
    warn: Warn = WARN,
) -> Iterator[int]:
    """Write the missing token files of a set; yields the number of files after each.

    Args:
        member: the member of each sample that is encoded.
        warn: as in `process_shards`.

    Raises ShardError for a shard that its index does not match.
    """
    make_encoder = partial(TokenEncoder, index.header, tokenizer, files, member)
    return process_shards(make_encoder, index, token_names(index), files=files, resources=resources, warn=warn)
