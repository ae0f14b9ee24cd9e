"""Pieces of work on Ray Data, records of earlier tries' parts, and the writing of shards from items."""

import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
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

OWN_ERRORS = {error.__name__: error for error in (DataError, ShardError, SourceError, StoreError)}
Warn = Callable[[str], None]  # shows a line to the user
WARN: Warn = logging.getLogger(__name__).warning
Work = Callable[[int, str], str]  # number of the piece, its description -> its result; picklable
T = TypeVar("T")


def run_pieces(work: Work, pieces: Sequence[str], *, num_cpus: float) -> Iterator[tuple[int, str]]:
    """Yields (number, result) of each piece as tasks finish, a Ray Data task for each.
    Raises this package's own errors as the task raised them, without a remote traceback around the line."""

    def run_row(row: dict[str, Any]) -> dict[str, Any]:
        try:
            return {"number": row["number"], "error": "", "content": work(row["number"], row["content"])}
        except tuple(OWN_ERRORS.values()) as error:
            name = next(name for name, kind in OWN_ERRORS.items() if isinstance(error, kind))
            return {"number": row["number"], "error": name, "content": str(error)}

    if not pieces:
        return
    quiet_ray_data()
    portable(work, what="what reads the source")
    rows = [{"number": number, "content": piece} for number, piece in enumerate(pieces)]
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map(run_row, num_cpus=num_cpus)
    dataset.context.enable_progress_bars = dataset.context.print_on_execution_start = False
    for row in dataset.iter_rows():
        if row["error"]:
            raise OWN_ERRORS[row["error"]](row["content"])
        yield row["number"], row["content"]


def read_part(files: Store, number: int, content: str) -> str:
    """Reads a part: name and recipe in, on two lines, the part's `Look` (JSON) out."""
    name, _, recipe = content.partition("\n")
    return look_at(files, name, recipe=recipe).model_dump_json()


def whole_parts(recipes: Mapping[str, str], *, files: Store, num_cpus: float, warn: Warn) -> dict[str, Record]:
    """Records of the parts that an earlier try left whole in `files`; all their files are read.
    `recipes`: name of a part -> digest of all that decides it, "" where the stage's key alone does. `num_cpus`: logical
    CPUs of a reading task. `warn` receives a line for each damaged part, which has to be made again."""
    names = sorted(recorded_parts(files) & recipes.keys())
    pieces = [f"{name}\n{recipes[name]}" for name in names]
    records = {}
    for number, content in run_pieces(partial(read_part, files), pieces, num_cpus=num_cpus):
        look = Look.model_validate_json(content)
        if look.record is not None:
            records[names[number]] = look.record
        elif look.damage:
            warn(f"{look.damage}; it is made again")
    return records


def cut_tasks(listing: Source, samples_per_shard: int) -> list[list[tuple[int, str]]]:
    """Cuts a source's items into shards of at most `samples_per_shard`, and the shards into tasks.
    A shard is a task, except where items come in runs that are best read in one go: then as many whole runs as fit into
    a shard, or a larger run as several equal shards. Returns each task as numbers and items (JSON) of its shards."""
    tasks = [even_parts(items, samples_per_shard) for items in _bundles(listing, samples_per_shard)]
    firsts = accumulate(map(len, tasks), initial=0)
    return [
        [(number, json.dumps(items)) for number, items in enumerate(shards, first)]
        for first, shards in zip(firsts, tasks, strict=False)
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


@dataclass(frozen=True)
class PartWriter:
    """Writes the shards of a task (JSON), shard after shard; their names and parts (JSON) out."""

    reader: Reader
    out: Store
    resolution: int
    holdout_fraction: float

    def __call__(self, number: int, content: str) -> str:
        parts = {part_name(shard): self.write(part_name(shard), items) for shard, items in json.loads(content)}
        return json.dumps({name: part.model_dump(mode="json") for name, part in parts.items()})

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
