"""Samples: both generators of the composed cascade at work, to be looked at and to be measured."""

from functools import partial
from itertools import chain
from typing import Any, NamedTuple

from pydantic import Field

from components.data.held_out import WordReader, Words, joined_words, random_part, read_split
from components.data.shards import ShardIndex, View, load_index
from components.evaluation.gallery import (
    DrawnGrid,
    GalleryConfig,
    draw_gallery,
    gallery_jobs,
    gallery_requests,
    read_gallery,
)
from components.evaluation.generated import measured_jobs, measured_requests, sample_jobs, seconds_per_image
from components.runtime import events
from components.runtime.pool import file_name
from components.runtime.storage.artifact import Artifact, read_records
from components.runtime.storage.store import Store
from components.sampling.cascade import Cascade
from components.sampling.image_files import encode_png
from components.sampling.requests import Request
from components.stages.context import StageContext

READ_RESOLUTION = 8  # pixels: only captions and labels are wanted


class SamplesConfig(GalleryConfig):
    """Images of each generator to show, and images to measure distances with."""

    stage_version = 3  # keeps the words that images were asked for by, and the seconds that they took

    measured_samples: int = Field(512, ge=0)  # of each generator, by the models' own settings
    seed: int = Field(0, ge=0)


def sample_generators(config: SamplesConfig, context: StageContext, *, images: Artifact, cascade: Artifact) -> Artifact:
    """Samples images for the report and images for the evaluation.

    Returns an artifact of kind `samples`: PNG grids, an npz of raw images for each job, and as metadata the words
    that images were asked for by and the seconds that each generator took for an image that is measured.
    """
    index, files, folder, done = load_index(images.url("index.json")), context.files_store, context.scratch(), 0
    with context.pool() as pool:
        part = random_part(index, samples=4 * config.measured_samples, seed=config.seed)
        read = partial(WordReader, index.model_copy(update={"shards": ()}), "train")
        trained = joined_words(list(pool.map(read, part.shards)))
        plan = pool.call(partial(plan_samples, config, index, trained, cascade))
        measured = {name: measured_jobs(name, requests) for name, requests in plan.measured.items()}
        jobs = gallery_jobs(plan.shown, strip_frames=config.strip_frames)
        jobs += chain(*measured.values())
        total = sum(len(job.requests) for job in jobs)
        for job in sample_jobs(jobs, cascade, files=files, pool=pool):
            context.report_images(done := done + len(job.requests), total)
        drawn = pool.call(partial(draw_samples, plan.shown, files, index.classes))
    names = [job.name for job in jobs]
    records = dict(zip(names, read_records(files, names), strict=True))
    taken = {name: seconds_per_image(group, records) for name, group in measured.items() if group}
    seconds = {f"seconds_per_image_{name}": value for name, value in taken.items()}
    for name, grid in drawn.items():
        (folder / f"{name}.png").write_bytes(grid.png)
        context.recorder.emit(events.Image(context.stage, 0, name, grid.png))
    context.recorder.emit(events.Metrics(context.stage, 0, seconds))
    metadata = {
        "summary": seconds,
        "measured": {generator: [file_name(job.name) for job in group] for generator, group in measured.items()},
        "contents": {file_name(job.name): records[job.name].facts["stages"] for job in chain(*measured.values())},
        "words": {name: grid.words for name, grid in drawn.items()},
    }
    parts = [entry for record in records.values() for entry in record.files]
    return context.commit("samples", folder=folder, parts=parts, metadata=metadata)


class SamplesPlan(NamedTuple):
    """Requests of shown images by image name, and of measured images by generator."""

    shown: dict[str, list[Request]]  # name of the image -> its requests
    measured: dict[str, list[Request]]  # generator -> its requests


def plan_samples(config: SamplesConfig, index: ShardIndex, trained: Words, cascade: Artifact) -> SamplesPlan:
    """Requests of shown and measured images, with conditions of real images that the models accept.

    Runs in a worker.

    Args:
        trained: of the training images whose conditions are measured with.
    """
    with cascade.local_copy() as place:
        models = Cascade.load(place)
    seed, condition, shown, given = config.seed, models.condition_images, list[bytes](), list[bytes]()
    held_out = read_split(index, "holdout", View(READ_RESOLUTION), limit=4 * config.num_prompts)
    if condition is not None:
        view = View(condition.resolution, condition.member)
        shown = [encode_png(image) for image in read_split(index, "holdout", view, limit=config.num_prompts).image]
        part = random_part(index, samples=4 * config.measured_samples, seed=seed)
        given = [encode_png(image) for image in read_split(part, "train", view).image]
    words: dict[str, Any] = {"labels": trained.label, "captions": trained.caption, "images": given}
    return SamplesPlan(
        gallery_requests(config, models, captions=held_out.caption or trained.caption, images=shown, seed=seed),
        {
            generator: measured_requests(models, generator, count=config.measured_samples, seed=seed, **words)
            for generator in models.generators
        },
    )


def draw_samples(shown: dict[str, list[Request]], files: Store, classes: tuple[str, ...]) -> dict[str, DrawnGrid]:
    """Grids of the shown images by name. Runs in a worker."""
    return draw_gallery(shown, read_gallery(shown, files), classes=classes)
