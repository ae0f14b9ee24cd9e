"""Read amplification of tars in the user's place, and the command that writes smaller tars."""

import shlex
from collections.abc import Sequence
from typing import NamedTuple

from rich.table import Table

from components.configuration.optimization import Training
from components.data.images import Degradation
from components.data.read_amplification import estimated_index, planned_reads, recommended_samples
from components.data.shards import INDEX, ShardIndex, load_index
from components.data.source_check import detect_source
from components.data.sources.webdataset import list_tars
from components.data.stream import Layout
from components.runtime.storage.connection import readable_bytes
from components.stages.images import ImagesConfig, shard_in_place
from pipelines.planning.profiles import Profile
from pipelines.planning.shares import table_of
from pipelines.workflow import PlannedStage, Stage

WORKERS = {2: 1, 16: 8, 128: 64}  # readers -> workers: two for each, where a profile says nothing
TOO_OFTEN = 2  # bytes read for each byte of the set


class TarReads(NamedTuple):
    """Reads of a training, by the number of readers."""

    stage: str
    layouts: dict[int, Layout]
    amplification: dict[int, float]  # bytes that are read for each byte of the set


def tars_in_place(planned: Sequence[PlannedStage]) -> ShardIndex | None:
    """The index, or an estimate, of the tars that trainings will read in the user's place.
    None for a set whose shards are written by its own stage. Raises SourceError."""
    entry = next((entry for entry in planned if isinstance(entry.stage.config, ImagesConfig)), None)
    if entry is None:
        return None
    config = entry.stage.config
    assert isinstance(config, ImagesConfig)
    if entry.cached is not None:
        return None if shard_in_place(entry.cached) is None else load_index(entry.cached.url(INDEX))
    source, path = detect_source(config.source)
    if source == "webdataset" and path is not None:
        tars = list_tars(path)
        return estimated_index(tars, holdout_fraction=config.holdout_fraction, text_length=config.text_length)
    return load_index(path) if source == "shards" and path is not None else None


def tar_reads(planned: Sequence[PlannedStage], profile: Profile, index: ShardIndex) -> list[TarReads]:
    """Reads of each training to run on the set itself, with no more workers than its batch has images."""
    rows = []
    for entry in planned:
        stage, config = entry.stage, entry.stage.config
        if entry.wanted and isinstance(config, Training) and (side := resolution_read(stage)) is not None:
            own = profile.resources(stage.name, num_workers=profile.given(stage.name, "num_workers") or 1)
            workers, most = WORKERS | {own.readers: own.num_workers}, config.optimization.global_batch_size
            layouts = {
                readers: layout_of(config, index, resolution=side, workers=count)
                for readers, count in sorted(workers.items())
                if count <= most
            }
            counted = {n: planned_reads(index, layout, readers=n).amplification for n, layout in layouts.items()}
            rows.append(TarReads(stage.name, layouts, counted))
    return rows


def resolution_read(stage: Stage) -> int | None:
    """Side of the set's images in a training; None for a training on other data."""
    config, images, autoencoder = stage.config, stage.inputs.get("images"), stage.inputs.get("autoencoder")
    if not isinstance(images, Stage) or not isinstance(images.config, ImagesConfig):
        return None
    if isinstance(autoencoder, Stage) and isinstance(autoencoder.config, Training):
        return autoencoder.config.needs().resolution  # of which it makes latents
    return config.needs().resolution if isinstance(config, Training) else None


def layout_of(config: Training, index: ShardIndex, *, resolution: int, workers: int) -> Layout:
    """Layout of a training's stream."""
    optimization, needs = config.optimization, config.needs()
    degradation = Degradation(optimization.seed, needs.degradations) if needs.degradations else None
    size, seed, text_length = optimization.global_batch_size, optimization.seed, index.text.text_length
    member = needs.condition_member
    return Layout(resolution, size, workers, seed, text_length, condition_member=member, degradation=degradation)


def reads_title(index: ShardIndex) -> str:
    sizes = sorted(entry.bytes for entry in index.shards)
    typical = readable_bytes(sizes[len(sizes) // 2])
    return f"{len(sizes)} tars of {typical}, read where they are; bytes read for each byte of the set, an epoch:"


def reads_table(rows: Sequence[TarReads]) -> Table:
    """A table with a row for each training, and a column for each number of readers."""
    counts = sorted({count for row in rows for count in row.amplification})
    table = table_of("training", ("side", "batch", *(f"{count} readers" for count in counts)))
    for row in rows:
        layout = next(iter(row.layouts.values()))
        cells = [f"{row.amplification[count]:.1f}" if count in row.amplification else "" for count in counts]
        table.add_row(row.stage, str(layout.resolution), str(layout.global_batch_size), *cells)
    return table


def reads_warning(rows: Sequence[TarReads], index: ShardIndex, config: ImagesConfig) -> list[str]:
    """Warnings of tars that are read too often, and the command that writes smaller ones; [] otherwise.
    That command has the recipe's hold-out and tokenizer."""
    often, readers, stage = max((often, n, row.stage) for row in rows for n, often in row.amplification.items())
    if often < TOO_OFTEN:
        return []
    samples = min(
        recommended_samples(index, layout, readers=count)
        for row in rows
        for count, layout in row.layouts.items()
        if row.amplification[count] >= TOO_OFTEN
    )
    source, path = detect_source(config.source)
    tars = config.source if source == "webdataset" else f"{path}/*.tar"
    return [
        f"warning: {readers} readers of {stage} fetch these tars {often:.1f} times an epoch. Write smaller ones once, "
        "and read those:",
        f"  cascade data webdataset {shlex.quote(tars)} --out FOLDER --samples-per-shard {samples} "
        f"--holdout-fraction {config.holdout_fraction:g} --vocab-size {config.vocab_size} "
        f"--text-length {config.text_length}",
    ]
