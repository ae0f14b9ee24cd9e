"""Pieces of work on Ray Data, records of earlier tries' parts, and the writing of shards from items."""

import hashlib
import json
import logging
import math
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, pairwise
from typing import Any, TypeVar

import ray.data

from components.configuration.config import Config
from components.data.listing import DataError, ShardError, SourceError, reason_of
from components.data.shards import Quarantined, ShardEntry, split_of
from components.data.sources.source import Item, Reader, Source
from components.data.tars import write_shard
from components.runtime.pool import portable
from components.runtime.ray_internals import quiet_ray_data
from components.runtime.storage.artifact import Look, Record, look_at, recorded_parts, write_file, write_record
from components.runtime.storage.store import Store, StoreError
from components.sampling.image_files import encode_png

OWN_ERRORS = (DataError, ShardError, SourceError, StoreError)
Warn = Callable[[str], None]  # shows a line to the user
WARN: Warn = logging.getLogger(__name__).warning
Task = dict[str, str]  # names of parts that are made in one go -> descriptions
P = TypeVar("P")
T = TypeVar("T")


def run_pieces(work: Callable[[P], T], pieces: Sequence[P], *, num_cpus: float) -> Iterator[T]:
    """Yields the result of each piece as tasks finish, a Ray Data task for each; `work` is picklable.
    Raises this package's own errors as the task raised them, without a remote traceback around the line."""

    def run_row(row: dict[str, Any]) -> dict[str, Any]:
        try:
            result: Any = work(pickle.loads(row["piece"]))
        except OWN_ERRORS as error:
            result = error
        return {"result": pickle.dumps(result)}

    if not pieces:
        return
    quiet_ray_data()
    portable(work, what="what reads the source")
    rows = [{"piece": pickle.dumps(piece)} for piece in pieces]
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map(run_row, num_cpus=num_cpus)
    dataset.context.enable_progress_bars = dataset.context.print_on_execution_start = False
    for row in dataset.iter_rows():
        if isinstance(result := pickle.loads(row["result"]), OWN_ERRORS):
            raise result
        yield result


def whole_parts(recipes: Mapping[str, str], *, files: Store, num_cpus: float, warn: Warn) -> dict[str, Record]:
    """Records of the parts that an earlier try left whole in `files`; all their files are read.
    `recipes`: name of a part -> digest of all that decides it, "" where the name alone does. `num_cpus`: logical
    CPUs of a reading task. `warn` receives a line for each damaged part, which has to be made again."""
    pieces, records = [(name, recipes[name]) for name in recorded_parts(files) & recipes.keys()], dict[str, Record]()

    def look(piece: tuple[str, str]) -> tuple[str, Look]:
        return piece[0], look_at(files, piece[0], recipe=piece[1])

    for name, seen in run_pieces(look, sorted(pieces), num_cpus=num_cpus):
        if seen.record is not None:
            records[name] = seen.record
        elif seen.damage:
            warn(f"{seen.damage}; it is made again")
    return records


def cut_tasks(listing: Source, samples_per_shard: int) -> list[Task]:
    """Cuts a source's items into shards of at most `samples_per_shard`, and the shards into tasks.
    A shard is a task, except where items come in runs that are best read in one go: then as many whole runs as fit into
    a shard, or a larger run as several equal shards. A shard's description is its items as JSON."""
    number = count()
    return [
        {part_name(next(number)): json.dumps(items) for items in even_parts(bundle, samples_per_shard)}
        for bundle in _bundles(listing, samples_per_shard)
    ]


def even_parts(items: Sequence[T], most: int) -> list[Sequence[T]]:
    """Parts of about equal size, in order, of at most `most` items each; a single empty part of no items."""
    count = max(1, math.ceil(len(items) / most))
    bounds = [len(items) * part // count for part in range(count + 1)]
    return [items[first:stop] for first, stop in pairwise(bounds)]


def _bundles(listing: Source, most: int) -> Iterator[Sequence[Item]]:
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


class Part(Config):
    """The contribution of a shard to the index."""

    entry: ShardEntry
    captions: tuple[str, ...]  # of its training samples

    @property
    def done(self) -> int:
        """Images that were read."""
        return self.entry.samples + len(self.entry.quarantined)


@dataclass(frozen=True)
class PartWriter:
    """Writes the shards of a task, shard after shard."""

    reader: Reader
    out: Store
    resolution: int
    holdout_fraction: float

    def __call__(self, task: Task) -> dict[str, Part]:
        return {name: self.write(name, content) for name, content in task.items()}

    def recipe(self, content: str) -> str:
        """Digest of all that decides the bytes of a shard of the items `content`."""
        recipe = json.dumps([repr(self.reader), self.resolution, self.holdout_fraction, content])
        return hashlib.sha256(recipe.encode()).hexdigest()

    def write(self, name: str, content: str) -> Part:
        """Writes a shard of the items `content` (JSON), and a record of it; quarantines what can't be drawn."""
        samples: list[dict[str, bytes | str]] = []
        quarantined, captions = [], []
        for item in (Item(*fields) for fields in json.loads(content)):
            try:
                data = self.reader.read(item)
            except FileNotFoundError as error:
                raise SourceError(f"{item.location} has vanished since the source was listed; start again") from error
            try:
                drawing = self.reader.draw(item, data, resolution=self.resolution)
            except Exception as error:  # Pillow's decoders raise a dozen kinds for a corrupt file
                quarantined.append(Quarantined(key=item.key, shard=f"{name}.tar", reason=reason_of(error)))
                continue
            own: dict[str, bytes | str] = {"png": encode_png(drawing.image), "cls": str(item.label).encode()}
            details = json.dumps(drawing.details, sort_keys=True).encode()
            samples.append(
                {"__key__": item.key, **own, "txt": item.caption.encode(), "json": details, **drawing.members}
            )
            if split_of(item.key, self.holdout_fraction) == "train":
                captions.append(item.caption)
        file = write_file(self.out, f"{name}.tar", write_shard(samples))
        counts = {"samples": len(samples), "train_samples": len(captions), "quarantined": tuple(quarantined)}
        part = Part(entry=ShardEntry(url=file.path, **file.digest._asdict(), **counts), captions=tuple(captions))
        write_record(self.out, name, file, recipe=self.recipe(content), **part.model_dump())
        return part


def part_name(number: int) -> str:
    """Name of a shard's part, without a suffix."""
    return f"shard-{number:06d}"
