"""Restoration of degraded held-out images by an image-to-image model, task by task."""

from functools import partial
from typing import Any, NamedTuple

import numpy as np
from pydantic import Field

from components.data.held_out import random_part, read_split
from components.data.images import jpeg_compressed
from components.data.shards import ShardIndex, load_index
from components.evaluation.features import check_feature_network
from components.evaluation.generated import SampleJob, jobs_of, joined, read_job
from components.evaluation.image_sets import REFERENCE, FileImages, ImageSet, split_parts
from components.evaluation.job_sampler import sample_jobs
from components.evaluation.measure import MeasureConfig, measure_distances
from components.evaluation.restoration import (
    Damaged,
    asked_of,
    damage,
    draw_restorations,
    restoration_figures,
    restoration_table,
    restorations,
)
from components.runtime.pool import file_name
from components.runtime.storage.artifact import Artifact
from components.runtime.storage.store import Store
from components.sampling.cascade import Cascade
from components.sampling.model import SamplingModel
from components.stages.context import StageContext


class RestorationConfig(MeasureConfig):
    """Number of degraded images, and the settings of distances to the training images."""

    samples: int = Field(64, ge=2)  # held-out images, each degraded in every way


def measure_restoration(
    config: RestorationConfig, context: StageContext, *, images: Artifact, cascade: Artifact
) -> Artifact:
    """Degrades held-out images in every trained way, and measures the model's restorations.

    Returns an artifact of kind `report`: a table with signal-to-noise ratios and distances, and an image with rows of
    what was given and what was made. Raises, before any work, FeatureNetworkError if the feature network is not
    installed, ValueError for a cascade that does not work on images or a set that holds no image out.
    """
    check_feature_network(config.feature_network)
    index, files, done = load_index(images.url("index.json")), context.files_store, 0
    with context.pool() as pool:
        plan = pool.call(partial(plan_restoration, config, index, cascade))
        every = [job for group in plan.jobs.values() for job in group]
        total = sum(len(job.requests) for job in every)
        for job in sample_jobs(every, cascade, files=files, pool=pool):
            context.report_images(done := done + len(job.requests), total)
        distances: dict[str, float] = {}
        if config.feature_network != "none":
            sets = sets_of(config, index, plan, files)
            work, progress = context.work_store, context.report_images
            rows = measure_distances(sets, config, work=work, pool=pool, progress=progress)
            distances = {row.name: row.distance for row in rows}
        found = pool.call(partial(read_restorations, config, index, cascade, plan, files, distances))
    return context.commit_study(
        plots={},
        tables={"Restored held-out images": found.table},
        summary=found.figures,
        headline={name: value for name, value in found.figures.items() if not name.endswith("degraded")},
        images={"restored": found.image},
    )


class RestorationPlan(NamedTuple):
    """Sampling jobs by degradation, for the restoring model."""

    jobs: dict[str, list[SampleJob]]  # degradation -> its jobs
    model: str  # name of its stage
    resolution: int


class RestorationResult(NamedTuple):
    """Figures, table and image of a measured restoration."""

    table: dict[str, Any]
    figures: dict[str, float]
    image: bytes  # PNG


def degraded(
    config: RestorationConfig, index: ShardIndex, cascade: Artifact
) -> tuple[SamplingModel, np.ndarray, list[Damaged]]:
    """The model, held-out images (N, H, W, 3), and all degradations, equal in every run.

    Runs in a worker.

    Raises ValueError as `measure_restoration`.
    """
    with cascade.local_copy() as folder:
        maker = Cascade.load(folder).makers.get("translate")
    if maker is None:
        raise ValueError("this cascade has no image-to-image model whose restorations could be measured")
    model = maker.first
    size = model.settings["resolution"]
    held_out = read_split(index, "holdout", resolution=size, limit=config.samples)
    if not held_out.key:
        raise ValueError(f"{index.source} holds no image out; set images.holdout_fraction")
    damaged = damage(
        held_out.image,
        tasks=model.settings["tasks"],
        mask_area=model.settings["mask_area"],
        factors=model.settings["super_resolution_factors"],
        compress=jpeg_compressed,
        asked=asked_of(model, held_out.label, held_out.caption),
        seed=config.seed,
    )
    return model, held_out.image, damaged


def plan_restoration(config: RestorationConfig, index: ShardIndex, cascade: Artifact) -> RestorationPlan:
    """The jobs of every degradation. Runs in a worker."""
    model, _, damaged = degraded(config, index, cascade)
    jobs = {each.name: jobs_of(each.name.replace(" ", "_"), each.requests) for each in damaged}
    return RestorationPlan(jobs, model.name, model.settings["resolution"])


def sets_of(config: RestorationConfig, index: ShardIndex, plan: RestorationPlan, files: Store) -> dict[str, ImageSet]:
    """Sets for distances: training images, and the restored images of each degradation."""
    part, limit = random_part(index, samples=config.reference_samples, seed=config.seed), config.reference_samples
    trained = split_parts(part, "train", resolution=plan.resolution, limit=limit)
    sets = {REFERENCE: ImageSet(tuple(trained), "scale")}
    for name, jobs in plan.jobs.items():
        array = f"image.{plan.model}"
        parts = [FileImages(files, file_name(job.name), array, len(job.requests)) for job in jobs]
        sets[name] = ImageSet(tuple(parts), "model")
    return sets


def read_restorations(
    config: RestorationConfig,
    index: ShardIndex,
    cascade: Artifact,
    plan: RestorationPlan,
    files: Store,
    distances: dict[str, float],
) -> RestorationResult:
    """Figures, table and image, read from the files of the jobs. Runs in a worker."""
    _, originals, damaged = degraded(config, index, cascade)
    made = {name: joined([read_job(job.name, files) for job in jobs]).finished for name, jobs in plan.jobs.items()}
    found = restorations(damaged, made, originals)
    return RestorationResult(restoration_table(found, distances), restoration_figures(found), draw_restorations(found))
