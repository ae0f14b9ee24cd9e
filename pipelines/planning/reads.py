"""Reads of tars in the user's place, memory of a reader, and the command that writes smaller tars."""

import math
import shlex
from collections.abc import Sequence
from typing import NamedTuple

from rich import filesize
from rich.table import Table

from components.configuration.optimization import Training
from components.data.order import Order
from components.data.shards import INDEX, load_index
from components.data.source_check import detect_source, shard_in_place
from components.data.sources.webdataset import list_tars
from components.runtime.storage.model_table import column_of
from components.stages.images import ImagesConfig
from pipelines.planning.profiles import Profile
from pipelines.planning.shares import table_of
from pipelines.workflow import PlannedStage

WORKERS = (1, 8, 64)  # beside the profile's own number
TOO_OFTEN = 1.5  # bytes read for each byte of the set
TOO_MUCH = 8 * 2**30  # bytes of shards that a reader holds
UNIT = 2**10  # bytes for which a tar that nobody has read counts as a sample


class Reads(NamedTuple):
    """Reads of a training's first epoch, by the number of workers."""

    stage: str
    streams: int
    often: dict[int, float]  # bytes read for each byte of the set
    held: dict[int, int]  # bytes of the shards that a worker's reader holds


def tars_in_place(planned: Sequence[PlannedStage]) -> list[int]:
    """Sizes in bytes of the tars in the user's place that trainings will read.
    [] for a set that its stage writes. Raises SourceError."""
    for entry in planned:
        if not isinstance(entry.stage.config, ImagesConfig):
            continue
        source, path = detect_source(entry.stage.config.source) if entry.cached is None else ("shards", None)
        if entry.cached is not None and shard_in_place(entry.cached) is not None:
            path = entry.cached.url(INDEX)
        if source == "webdataset" and path is not None:
            return [tar.bytes for tar in list_tars(path)]
        if source == "shards" and path is not None:
            return column_of(load_index(path).shards, "bytes").tolist()
    return []


def reads_of(planned: Sequence[PlannedStage], profile: Profile, sizes: Sequence[int]) -> list[Reads]:
    """Reads of each training to run on images, with no more workers than its batch has images.
    A tar counts as samples of equal size: what is fetched follows from the places of the cuts alone."""
    rows, counts = [], [max(1, size // UNIT) for size in sizes]
    for entry in planned:
        stage, config = entry.stage, entry.stage.config
        given = stage.parents.get("images")  # other sets than the first stage's are its copies, encoded
        if given is None or not isinstance(given.config, ImagesConfig):
            continue
        if not entry.wanted or not isinstance(config, Training) or not config.trains:
            continue
        optimization, streams = config.optimization, config.optimization.streams
        order = Order(counts, seed=optimization.seed, streams=streams)
        workers = {*WORKERS, profile.given(stage.name, "num_workers") or 1}
        workers = [count for count in sorted(workers) if count <= optimization.global_batch_size]
        often = {count: order.fetched(sizes, count) / sum(sizes) for count in workers}
        some = sorted(sizes)[len(sizes) // 2]
        held = {n: some * min(len(sizes), streams // math.gcd(n, streams)) for n in workers}
        rows.append(Reads(stage.name, streams, often, held))
    return rows


def reads_table(rows: Sequence[Reads]) -> Table:
    """A table with a row for each training, and a column for each number of workers."""
    counts = sorted({count for row in rows for count in row.often})
    table = table_of("training", ("streams", *(f"{count} worker{'s' * (count > 1)}" for count in counts)))
    for row in rows:
        cells = [f"{row.often[n]:.2f}, {filesize.decimal(row.held[n])}" if n in row.often else "" for n in counts]
        table.add_row(row.stage, str(row.streams), *cells)
    return table


def reads_warning(rows: Sequence[Reads], config: ImagesConfig) -> list[str]:
    """Warnings of tars read too often or too large to hold, and the command for smaller ones.
    That command has the recipe's hold-out and tokenizer."""
    lines = []
    often, count, stage = max((often, n, row.stage) for row in rows for n, often in row.often.items())
    if often >= TOO_OFTEN:
        lines.append(f"warning: {count} workers of {stage} fetch these tars {often:.1f} times an epoch")
    held, count, stage = max((held, n, row.stage) for row in rows for n, held in row.held.items())
    if held >= TOO_MUCH:
        lines.append(f"warning: each reader of {count} workers of {stage} holds {filesize.decimal(held)} of these tars")
    if not lines:
        return []
    if detect_source(config.source).source == "shards":  # their class names and hold-out share are in the index
        return [*lines, "Write the set once more from its source, with a smaller --samples-per-shard, and read that"]
    return [
        *lines,
        "Write smaller ones once, and read those:",
        f"  cascade data webdataset {shlex.quote(config.source)} --out FOLDER --holdout-fraction "
        f"{config.holdout_fraction:g} --vocab-size {config.vocab_size} --text-length {config.text_length}",
    ]
