"""The cascade, every trained network in one folder, and samples of its generators."""

from functools import partial
from itertools import chain
from typing import Any

from pydantic import Field

from components.configuration.sampling import SamplingConfig
from components.data.held_out import SMALL, Words, joined_words, random_part, read_split, shard_words
from components.data.shards import BPE, INDEX, ShardIndex, View, load_index
from components.evaluation import generated
from components.evaluation.gallery import GalleryConfig, draw_gallery, gallery_jobs, gallery_requests
from components.runtime import events
from components.runtime.pool import file_name
from components.runtime.storage.artifact import Artifact, FileEntry, read_records, upload_attempt
from components.runtime.storage.scratch import scratch_folder
from components.runtime.storage.store import Store
from components.sampling.cascade import Cascade, compose
from components.sampling.image_files import encode_png
from components.sampling.requests import Request
from components.stages.context import StageContext
from components.training.subject import SUBJECT, SubjectConfig, compose_start, write_subject
from components.weights.starts import open_start


def compose_cascade(
    config: SamplingConfig, context: StageContext, *, upsamplers: list[Artifact] | None = None, **parts: Artifact
) -> Artifact:
    """Copies the parts side by side, and writes roles and sampling settings to `cascade.json`.
    `upsamplers`: smallest first; `parts`: the other models by what they are in a `Cascade`, as tokenizer or base.

    Returns an artifact of kind `model` that `Cascade.load` opens anywhere, without the storage it came from."""
    larger = {artifact.stage: artifact for artifact in upsamplers or []}
    config.by_model(tuple(larger))  # raises here, for another number of upsamplers
    with context.pool() as pool:
        entries = pool.call(partial(copy_parts, parts, larger, config, context.store))
    return context.commit("model", entries=entries, metadata={"parts": [*parts, *larger]})


def copy_parts(
    parts: dict[str, Artifact], upsamplers: dict[str, Artifact], sampling: SamplingConfig, store: Store
) -> list[FileEntry]:
    """Composes the models in a folder with sampling settings, and uploads it. Runs in a worker."""
    with scratch_folder("cascade") as place:
        home, composed = place / "parts", place / "composed"
        folders, larger = (
            {name: artifact.download(home / name) for name, artifact in group.items()} for group in (parts, upsamplers)
        )
        settings = sampling.by_model(tuple(larger))
        compose(composed, upsamplers=larger, sampling=settings, precision=sampling.precision, **folders)
        return upload_attempt(store, composed)


class SamplesConfig(GalleryConfig):
    """Images of each generator to show, and images to measure distances with."""

    stage_version = 3  # keeps the words that images were asked for by, and the seconds that they took

    measured_samples: int = Field(512, ge=0)  # of each generator, by the models' own settings
    seed: int = Field(0, ge=0)


def sample_generators(config: SamplesConfig, context: StageContext, *, images: Artifact, cascade: Artifact) -> Artifact:
    """Samples images for the report and images for the evaluation.
    Returns an artifact of kind `samples`: PNG grids, an npz of raw images for each job, and as metadata the words that
    images were asked for by and the seconds that each generator took for an image that is measured."""
    index, files, folder, done = load_index(images.url("index.json")), context.files_store, context.scratch(), 0
    with context.pool() as pool:
        part = random_part(index, samples=4 * config.measured_samples, seed=config.seed)
        read = partial(shard_words, index.header, "train")
        trained = joined_words(list(pool.map(lambda: read, part.shards)))
        shown, requests = pool.call(partial(plan_samples, config, index, trained, cascade))
        measured = {name: generated.measured_jobs(name, own) for name, own in requests.items()}
        jobs = [*gallery_jobs(shown, strip_frames=config.strip_frames), *chain(*measured.values())]
        total = sum(len(job.requests) for job in jobs)
        for job in pool.finish(partial(generated.CascadeSampler, cascade, files), jobs, files=files):
            context.report_images(done := done + len(job.requests), total)
        drawn = pool.call(partial(draw_gallery, shown, files, classes=index.classes))
    names = [job.name for job in jobs]
    records = dict(zip(names, read_records(files, names), strict=True))
    taken = {name: generated.seconds_per_image(group, records) for name, group in measured.items() if group}
    seconds = {f"seconds_per_image_{name}": value for name, value in taken.items()}
    context.write_images(folder, {name: png for name, (png, _) in drawn.items()})
    context.recorder.emit(events.Metrics(context.stage, 0, seconds))
    metadata = {
        "summary": seconds,
        "measured": {generator: [file_name(job.name) for job in group] for generator, group in measured.items()},
        "contents": {file_name(job.name): records[job.name].facts["stages"] for job in chain(*measured.values())},
        "words": {name: words for name, (_, words) in drawn.items()},
    }
    parts = [entry for record in records.values() for entry in record.files]
    return context.commit("samples", folder=folder, parts=parts, metadata=metadata)


def preserve_prior(config: SubjectConfig, context: StageContext, *, images: Artifact, **parts: Artifact) -> Artifact:
    """Samples the model that a training begins with, and puts the images beside the samples.
    `parts`: models that it samples with, by what they are in a `Cascade`: its autoencoder, its text encoder.
    Returns an artifact of kind `shards`, with classes and tokenizer of the model; a killed try's samples are kept.
    Raises ValueError, in one line, for a start or for words that do not fit."""
    assert config.init_from is not None
    assert config.sampling is not None
    start, index, files = open_start(config.init_from), load_index(images.url("index.json")), context.files_store
    words = config.requests(start.model)
    requests = [words[1].replace(seed=number) for number in range(config.samples)]
    jobs, done = generated.jobs_of("prior", requests), 0
    with context.pool() as pool:
        entries = pool.call(partial(compose_start, start, config.sampling, context.work_store, parts))
        place = {"stage": context.stage, "key": context.key, "root": context.work_store.uri}
        cascade = Artifact(kind="model", files=tuple(entries), **place)
        for job in pool.finish(partial(generated.CascadeSampler, cascade, files), jobs, files=files):
            context.report_images(done := done + len(job.requests), config.samples)
        made = generated.read_jobs(jobs, files).finished
        facts = pool.call(partial(write_subject, start, config.weight, index, words, made, files))
    return context.commit("shards", written=[INDEX, BPE, SUBJECT], metadata=facts)


def plan_samples(
    config: SamplesConfig, index: ShardIndex, trained: Words, cascade: Artifact
) -> tuple[dict[str, list[Request]], dict[str, list[Request]]]:
    """Requests of shown images by image name, and of measured images by generator. Runs in a worker.
    Conditions are those of real images, of `trained` for measured ones, as far as the models accept them."""
    with cascade.local_copy() as place:
        models = Cascade.load(place)
    seed, condition, shown, given = config.seed, models.condition_images, list[bytes](), list[bytes]()
    held_out = read_split(index, "holdout", View(SMALL), limit=4 * config.num_prompts)
    if condition is not None:
        view = View(condition.resolution, condition.member)
        shown = [encode_png(image) for image in read_split(index, "holdout", view, limit=config.num_prompts).image]
        part = random_part(index, samples=4 * config.measured_samples, seed=seed)
        given = [encode_png(image) for image in read_split(part, "train", view).image]
    words: dict[str, Any] = {"labels": trained.label, "captions": trained.caption, "images": given}
    captions = held_out.caption or trained.caption
    return gallery_requests(config, models, captions=captions, images=shown, seed=seed), {
        generator: generated.measured_requests(models, generator, count=config.measured_samples, seed=seed, **words)
        for generator in models.generators
    }
