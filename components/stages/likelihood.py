"""Likelihood: the variational bound of a trained diffusion model on held-out pictures, in bits a dimension."""

from pydantic import Field

from components.configuration import Config
from components.data.held_out import read_split
from components.data.shards import load_index
from components.evaluation.likelihood import (
    bound_jobs,
    bound_table,
    check_model,
    draw_terms,
    is_gray,
    measure_bounds,
    read_bound,
    summarize,
)
from components.sampling.model import load_model
from components.stages.context import StageContext
from components.storage.artifact import Artifact


class LikelihoodConfig(Config):
    """Of how many pictures, and whether exactly."""

    samples: int = Field(256, ge=1)  # held-out pictures
    timesteps_per_picture: int | None = Field(None, ge=1)  # None: all, the exact sum; fewer are a stratified estimate
    seed: int = Field(0, ge=0)


def measure_likelihood(
    config: LikelihoodConfig, context: StageContext, *, images: Artifact, model: Artifact
) -> Artifact:
    """Measure prior, denoising and reconstruction terms of held-out pictures under their own conditions.

    Returns an artifact of kind `report`: plots over t, a table with standard errors over pictures, and the figures.
    Raises ValueError for a model that has no such bound, or a set that holds no picture out.
    """
    index, loaded = load_index(images.url("index.json")), load_model(model.stage, model.download(context.scratch()))
    check_model(loaded)
    held_out = read_split(index, "holdout", resolution=loaded.settings["resolution"], limit=config.samples)
    if not held_out.key:
        raise ValueError(f"{index.source} holds no picture out; set images.holdout_fraction")
    jobs, done = bound_jobs(held_out.image, held_out.label, held_out.caption), 0
    measured = measure_bounds(
        jobs,
        model,
        timesteps_per_picture=config.timesteps_per_picture,
        seed=config.seed,
        files=context.files_store,
        resources=context.resources,
    )
    for job in measured:
        done += len(job.image)
        context.recorder.progress(context.stage, step=done, total=len(held_out.key), unit="picture")
    found = read_bound(context.files_store, jobs)
    summary = summarize(found, gray=is_gray(held_out.image))
    return context.commit_study(
        plots={"Terms of the bound over t": draw_terms(found, salt=context.stage)},
        tables={"Bits a dimension of held-out pictures": bound_table(found)},
        summary=summary,
        headline={name: value for name, value in summary.items() if not name.endswith("standard_error")},
    )
