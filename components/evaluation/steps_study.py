"""Study of Fréchet distance against the number of network evaluations.

Compares every sampler of one trained model.
"""

from dataclasses import replace
from typing import Annotated, Any, NamedTuple

import numpy as np
from pydantic import Field

from components.data.shards import ShardIndex
from components.evaluation.plots import Panel, Series, plot_svg
from components.evaluation.variants import (
    HELD_OUT,
    Made,
    Measured,
    StudyPlan,
    VariantJob,
    VariantsConfig,
    counted,
    study_requests,
)
from components.models.diffusion.steps import SamplerName
from components.runtime.storage.artifact import Artifact
from components.sampling.cascade import Cascade
from components.sampling.device import best_device


class StepsStudyConfig(VariantsConfig):
    """Samplers and step counts to compare."""

    samplers: tuple[SamplerName, ...] = Field(("ddpm", "ddim", "dpm_solver_pp", "heun"), min_length=1)
    steps: tuple[Annotated[int, Field(ge=1)], ...] = Field((5, 10, 15, 25, 50), min_length=1)
    reference_sampler: SamplerName = "ddpm"  # sampler of the reference images
    reference_steps: int = Field(250, ge=1)


class SamplerSetting(NamedTuple):
    """Sampler and number of steps of a way to sample."""

    sampler: SamplerName
    steps: int

    @property
    def name(self) -> str:  # of jobs and metrics
        """Sampler and steps as a name for jobs and metrics."""
        return f"{self.sampler}_{self.steps}"

    @property
    def title(self) -> str:
        """Sampler and steps in words, for tables and rows of images."""
        return f"{self.sampler}, {self.steps} steps"


def settings_of(config: StepsStudyConfig) -> dict[str, SamplerSetting]:
    """Name -> setting, the reference last."""
    chosen = [SamplerSetting(sampler, steps) for sampler in config.samplers for steps in sorted(config.steps)]
    return {setting.name: setting for setting in (*chosen, reference_of(config))}


def reference_of(config: StepsStudyConfig) -> SamplerSetting:
    """The setting with the reference sampler and its number of steps."""
    return SamplerSetting(config.reference_sampler, config.reference_steps)


def plan_study(config: StepsStudyConfig, cascade: Artifact, index: ShardIndex) -> StudyPlan:
    """Requests with the conditions of training images. Runs in a worker. Raises as `load_cascade`."""
    loaded = load_cascade(cascade)
    assert loaded.base is not None
    return StudyPlan(study_requests(config, index, loaded, prompts=True), loaded.base.settings["resolution"])


def load_cascade(cascade: Artifact) -> Cascade:
    """Loads the cascade on the best available device.

    Raises ValueError for a cascade without a diffusion model.
    """
    with cascade.local_copy() as folder:
        loaded = Cascade.load(folder, device=best_device())
    if loaded.base is None:
        raise ValueError("this cascade has no diffusion model whose samplers could be compared")
    return loaded


def sample_in(cascade: Cascade, job: VariantJob) -> Made:
    """Images of the base alone by the job's sampler and steps.

    Raises ValueError if the objective has no such sampler.
    """
    base, setting = cascade.base, job.variant
    assert base is not None
    asked = [request.replace(**setting._asdict(), generator="diffusion") for request in job.requests]
    with counted(base.module) as sizes:
        images = replace(cascade, upsamplers=()).sample(asked, batch_size=len(asked))
    return Made(np.stack(images), sum(sizes) / len(images), np.zeros(0, bool))


def draw_steps(found: Measured, config: StepsStudyConfig, *, salt: str) -> dict[str, str]:
    """Plots by title, SVG: a line for each sampler, and the reference as a level."""
    reference, lines = found.points[reference_of(config).name], []
    for sampler in config.samplers:
        line = [found.points[SamplerSetting(sampler, steps).name] for steps in sorted(set(config.steps))]
        lines.append(Series(sampler, [point.evaluations for point in line], [point.distance for point in line]))
    panel = Panel(
        "network evaluations an image",
        f"Fréchet distance, {config.feature_network}",
        lines,
        levels={reference.setting.title: reference.distance, HELD_OUT: found.held_out_distance},
        log_x=True,
        log_y=True,
    )
    return {f"Distance against network evaluations, N {config.samples}": plot_svg([panel], salt=salt)}


def steps_table(found: Measured, config: StepsStudyConfig) -> dict[str, Any]:
    """Columns and rows for the report: evaluations and distance by sampler and steps."""
    return {
        "columns": ["sampler", "steps", "network evaluations", f"Fréchet distance, {config.feature_network}", "N"],
        "rows": [
            [*point.setting, point.evaluations, point.distance, config.samples] for point in found.points.values()
        ],
    }


def steps_summary(found: Measured, config: StepsStudyConfig) -> dict[str, float]:
    """Metric -> distance of each setting."""
    return {f"fd_{config.feature_network}_{name}": point.distance for name, point in found.points.items()}


def steps_headline(found: Measured, config: StepsStudyConfig) -> dict[str, float]:
    """The reference, and each sampler at the number of steps in the middle."""
    middle = sorted(config.steps)[len(config.steps) // 2]
    chosen = {SamplerSetting(sampler, middle) for sampler in config.samplers} | {reference_of(config)}
    return {
        f"distance, {point.setting.title} (N {config.samples})": point.distance
        for point in found.points.values()
        if point.setting in chosen
    }
