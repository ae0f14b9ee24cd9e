"""Tasks of an ingest: each writes shards from items, and a record of each finished shard."""

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TypeVar

from components.configuration.config import Config
from components.data.errors import SourceError, reason_of
from components.data.shards import Quarantined, ShardEntry, split_of
from components.data.sources.source import Item, Reader, Source
from components.data.tars import write_shard
from components.runtime.storage.kept_parts import write_file, write_record
from components.runtime.storage.store import Store
from components.sampling.image_files import encode_png

T = TypeVar("T")


def cut_tasks(listing: Source, samples_per_shard: int) -> list[str]:
    """Cuts a source's items into shards of at most `samples_per_shard`, and the shards into tasks.

    A shard is a task, except where items come in runs that are best read in one go: then as many whole runs as fit into
    a shard, or a larger run as several equal shards. Returns each task as JSON: numbers and items of its shards.
    """
    tasks: list[list[str]] = []
    for items in _bundles(listing, samples_per_shard):
        tasks.append([json.dumps(part) for part in even_parts(items, samples_per_shard)])
    firsts = accumulate(map(len, tasks), initial=0)
    return [json.dumps(list(enumerate(shards, first))) for first, shards in zip(firsts, tasks, strict=False)]


def even_parts(items: Sequence[T], most: int) -> list[Sequence[T]]:
    """Parts of about equal size, in order, of at most `most` items each; a single empty part of no items."""
    count = max(1, math.ceil(len(items) / most))
    bounds = [len(items) * part // count for part in range(count + 1)]
    return [items[first:stop] for first, stop in pairwise(bounds)]


def _bundles(listing: Source, most: int) -> Iterator[Sequence[Item]]:
    """The items of each task."""
    if not listing.runs:
        yield from (listing.items[first : first + most] for first in range(0, len(listing.items), most))
        return
    first = stop = 0
    for run in listing.runs:
        if first < stop and stop + run - first > most:
            yield listing.items[first:stop]
            first = stop
        stop += run
        if stop >= len(listing.items):  # a limit may cut a run
            break
    yield listing.items[first:stop]


class CorruptImageError(Exception):
    """An image can't be drawn: quarantined, not fatal."""


class Part(Config):
    """The contribution of a shard to the index."""

    entry: ShardEntry
    captions: tuple[str, ...]  # of its training samples


@dataclass(frozen=True)
class PartWriter:
    """Writes a shard: items (JSON) in, the shard's part (JSON) out."""

    reader: Reader
    out: Store
    resolution: int
    holdout_fraction: float

    def recipe(self, content: str) -> str:
        """Digest of all that decides the bytes of a shard of the items `content`."""
        recipe = json.dumps([repr(self.reader), self.resolution, self.holdout_fraction, content])
        return hashlib.sha256(recipe.encode()).hexdigest()

    def __call__(self, number: int, content: str) -> str:
        part, samples, quarantined, captions = part_name(number), [], [], []
        for item in (Item(*fields) for fields in json.loads(content)):
            try:
                samples.append(self._sample(item))
            except CorruptImageError as error:
                quarantined.append(Quarantined(key=item.key, shard=f"{part}.tar", reason=str(error)))
                continue
            if split_of(item.key, self.holdout_fraction) == "train":
                captions.append(item.caption)
        file = write_file(self.out, f"{part}.tar", write_shard(samples))
        entry = ShardEntry(
            url=file.path,
            **file.digest._asdict(),
            samples=len(samples),
            train_samples=len(captions),
            quarantined=tuple(quarantined),
        )
        contribution = Part(entry=entry, captions=tuple(captions))
        write_record(self.out, part, file, recipe=self.recipe(content), **contribution.model_dump())
        return contribution.model_dump_json()

    def _sample(self, item: Item) -> dict[str, bytes | str]:
        try:
            data = self.reader.read(item)
        except FileNotFoundError as error:
            raise SourceError(f"{item.location} has vanished since the source was listed; start again") from error
        try:
            drawing = self.reader.draw(item, data, resolution=self.resolution)
        except Exception as error:  # Pillow's decoders raise a dozen kinds for a corrupt file
            raise CorruptImageError(reason_of(error)) from error
        return {
            "__key__": item.key,
            "png": encode_png(drawing.image),
            "cls": str(item.label).encode(),
            "txt": item.caption.encode(),
            "json": json.dumps(drawing.details, sort_keys=True).encode(),
            **drawing.members,
        }


@dataclass(frozen=True)
class TaskWriter:
    """Writes the shards of a task (JSON), shard after shard; numbers and parts (JSON) out."""

    write: PartWriter

    def __call__(self, number: int, content: str) -> str:
        return json.dumps([(shard, self.write(shard, items)) for shard, items in json.loads(content)])


def part_name(number: int) -> str:
    """Name of a shard's part, without a suffix."""
    return f"shard-{number:06d}"
