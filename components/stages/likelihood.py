"""Likelihood: bits/dim of held-out images, exact (PixelCNN, Row LSTM) or a bound (VAE, diffusion)."""

from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
from pydantic import Field

from components.configuration.config import Config
from components.configuration.families import family_of
from components.data.held_out import read_split
from components.data.shards import ShardIndex, load_index
from components.evaluation.image_bits import (
    bits_table,
    check_likelihood,
    measure_images,
    read_bits,
    summarize_bits,
)
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
from components.runtime.storage.artifact import Artifact
from components.sampling.model import load_model
from components.stages.context import StageContext


class LikelihoodConfig(Config):
    """Number of images, and the choice of an exact or estimated bound of a diffusion model."""

    stage_version = 2  # gray images are one channel, and PNGs stand beside

    samples: int = Field(256, ge=1)  # held-out images
    timesteps_per_image: int | None = Field(None, ge=1)  # None: all, the exact sum; fewer are a stratified estimate
    seed: int = Field(0, ge=0)


def measure_likelihood(
    config: LikelihoodConfig, context: StageContext, *, images: Artifact, model: Artifact
) -> Artifact:
    """Measures bits/dim of held-out images under each image's own conditions.

    Of a diffusion model: prior, denoising and reconstruction.

    Returns an artifact of kind `report`: a table with standard errors over images, the figures, and, of a diffusion
    model, plots over t.
    Raises ValueError for a model that has no such bound, a set that holds no image out, or one in color where the model
    knows one channel.
    """
    files, done, seed = context.files_store, 0, config.seed
    with context.pool() as pool:
        plan = pool.call(partial(plan_bound, config, load_index(images.url("index.json")), model))
        if plan.likelihood is not None:
            measuring = measure_images(plan.jobs, model, seed=seed, files=files, pool=pool)
        else:
            steps = config.timesteps_per_image
            measuring = measure_bounds(plan.jobs, model, timesteps_per_image=steps, seed=seed, files=files, pool=pool)
        total = sum(len(job.image) for job in plan.jobs)
        for job in measuring:
            context.report_images(done := done + len(job.image), total)
    study = terms_over_t(plan, context) if plan.likelihood is None else whole_images(plan, context)
    summary = study["summary"]
    headline = {name: value for name, value in summary.items() if not name.endswith("standard_error")}
    return context.commit_study(**study, headline=headline)


def whole_images(plan: "BoundPlan", context: StageContext) -> dict[str, Any]:
    """Tables and figures of a model with a likelihood of whole images."""
    bits = read_bits(context.files_store, plan.jobs)
    table = bits_table(bits, png=plan.png, exact=plan.likelihood == "exact")
    return {
        "plots": {},
        "tables": {"Bits/dim of held-out images": table},
        "summary": summarize_bits(bits, png=plan.png),
    }


def terms_over_t(plan: "BoundPlan", context: StageContext) -> dict[str, Any]:
    """Plots, table and figures of a diffusion model, with terms over t."""
    found = read_bound(context.files_store, plan.jobs)
    return {
        "plots": {"Terms of the bound over t": draw_terms(found, salt=context.stage)},
        "tables": {"Bits/dim of held-out images": bound_table(found, png=plan.png)},
        "summary": summarize(found, png=plan.png),
    }


class BoundPlan(NamedTuple):
    """Jobs of a likelihood measurement, and the PNG sizes of the same images."""

    likelihood: Literal["exact", "bound"] | None  # of whole images; None: terms of a diffusion model's bound
    jobs: list[BoundJob]
    png: np.ndarray  # (N,) bits/dim of each image as a PNG


def plan_bound(config: LikelihoodConfig, index: ShardIndex, model: Artifact) -> BoundPlan:
    """Held-out images cut into jobs. Runs in a worker. Raises ValueError as `measure_likelihood`."""
    with model.local_copy() as folder:
        loaded = load_model(model.stage, folder)
    likelihood = family_of(loaded.kind).likelihood
    check = check_model if likelihood is None else check_likelihood
    check(loaded)
    held_out = read_split(index, "holdout", resolution=loaded.settings["resolution"], limit=config.samples)
    if not held_out.key:
        raise ValueError(f"{index.source} holds no image out; set images.holdout_fraction")
    png = png_bits(loaded, held_out.image)
    return BoundPlan(likelihood, bound_jobs(held_out.image, held_out.label, held_out.caption), png)
