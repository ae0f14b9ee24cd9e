"""Likelihood: the variational bound of a trained diffusion model on held-out images, in bits/dim."""

from functools import partial
from typing import NamedTuple

import numpy as np
from pydantic import Field

from components.configuration.config import Config
from components.data.held_out import read_split
from components.data.shards import ShardIndex, load_index
from components.evaluation.likelihood_study import (
    BoundJob,
    bound_jobs,
    bound_table,
    check_model,
    draw_terms,
    measure_bounds,
    png_bits,
    read_bound,
    summarize,
)
from components.sampling.model import load_model
from components.stages.context import StageContext
from components.storage.artifact import Artifact


class LikelihoodConfig(Config):
    """Of how many images, and whether exactly."""

    stage_version = 2  # gray images are one channel, and PNGs stand beside

    samples: int = Field(256, ge=1)  # held-out images
    timesteps_per_image: int | None = Field(None, ge=1)  # None: all, the exact sum; fewer are a stratified estimate
    seed: int = Field(0, ge=0)


def measure_likelihood(
    config: LikelihoodConfig, context: StageContext, *, images: Artifact, model: Artifact
) -> Artifact:
    """Measure prior, denoising and reconstruction terms of held-out images under their own conditions.

    Returns an artifact of kind `report`: plots over t, a table with standard errors over images, and the figures.
    Raises ValueError for a model that has no such bound, a set that holds no image out, or one in color where the model
    knows one channel.
    """
    files, done = context.files_store, 0
    with context.pool() as pool:
        plan = pool.call(partial(plan_bound, config, load_index(images.url("index.json")), model))
        total = sum(len(job.image) for job in plan.jobs)
        steps, seed = config.timesteps_per_image, config.seed
        for job in measure_bounds(plan.jobs, model, timesteps_per_image=steps, seed=seed, files=files, pool=pool):
            context.report_images(done := done + len(job.image), total)
    found = read_bound(files, plan.jobs)
    summary = summarize(found, png=plan.png)
    return context.commit_study(
        plots={"Terms of the bound over t": draw_terms(found, salt=context.stage)},
        tables={"Bits/dim of held-out images": bound_table(found, png=plan.png)},
        summary=summary,
        headline={name: value for name, value in summary.items() if not name.endswith("standard_error")},
    )


class BoundPlan(NamedTuple):
    """What is measured."""

    jobs: list[BoundJob]
    png: np.ndarray  # (N,) bits/dim of each image as a PNG


def plan_bound(config: LikelihoodConfig, index: ShardIndex, model: Artifact) -> BoundPlan:
    """Held-out images cut into jobs. Runs in a worker. Raises ValueError as `measure_likelihood`."""
    with model.local_copy() as folder:
        loaded = load_model(model.stage, folder)
    check_model(loaded)
    held_out = read_split(index, "holdout", resolution=loaded.settings["resolution"], limit=config.samples)
    if not held_out.key:
        raise ValueError(f"{index.source} holds no image out; set images.holdout_fraction")
    png = png_bits(loaded, held_out.image)
    return BoundPlan(bound_jobs(held_out.image, held_out.label, held_out.caption), png)
