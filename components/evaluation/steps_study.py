"""Fréchet distance against the number of network evaluations, for every sampler of one trained model."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, NamedTuple

import numpy as np
from pydantic import Field

from components.data.shards import ShardIndex
from components.data.subset import read_random_part
from components.diffusion.samplers import SamplerName
from components.evaluation.generated import measured_requests
from components.evaluation.measure import DistanceRow
from components.evaluation.plots import Panel, Series, plot_svg
from components.evaluation.variants import HELD_OUT, Figures, Made, VariantJob, VariantsConfig, counted, write_made
from components.sampling.cascade import Cascade
from components.sampling.device import best_device
from components.sampling.requests import Request
from components.storage.artifact import Artifact
from components.storage.store import Store

SMALL = 8  # pixels: only labels and captions are wanted


class StepsStudyConfig(VariantsConfig):
    """Which samplers run how many steps."""

    samplers: tuple[SamplerName, ...] = Field(("ddpm", "ddim", "dpm_solver_pp", "heun"), min_length=1)
    steps: tuple[Annotated[int, Field(ge=1)], ...] = Field((5, 10, 15, 25, 50), min_length=1)
    reference_sampler: SamplerName = "ddpm"  # what all are compared with
    reference_steps: int = Field(250, ge=1)


class Setting(NamedTuple):
    """One way to sample."""

    sampler: SamplerName
    steps: int

    @property
    def name(self) -> str:  # of jobs and metrics
        return f"{self.sampler}_{self.steps}"

    @property
    def title(self) -> str:
        return f"{self.sampler}, {self.steps} steps"


def settings_of(config: StepsStudyConfig) -> dict[str, Setting]:
    """Name -> setting, the reference last."""
    chosen = [Setting(sampler, steps) for sampler in config.samplers for steps in sorted(config.steps)]
    return {setting.name: setting for setting in (*chosen, reference_of(config))}


def reference_of(config: StepsStudyConfig) -> Setting:
    return Setting(config.reference_sampler, config.reference_steps)


class Plan(NamedTuple):
    """What a study starts from."""

    requests: list[Request]
    resolution: int


def plan_study(config: StepsStudyConfig, index: ShardIndex, cascade: Artifact) -> Plan:
    """Requests with the conditions of training images. Runs in a worker. Raises ValueError for a cascade without a
    diffusion model."""
    with cascade.local_copy() as folder:
        models = Cascade.load(folder)
    if models.base is None:
        raise ValueError("this cascade has no diffusion model whose samplers could be compared")
    trained = read_random_part(index, samples=config.reference_samples, seed=config.seed, resolution=SMALL)
    asked: dict[str, Any] = {"labels": trained.label, "captions": trained.caption, "count": config.samples}
    requests = measured_requests(models, "diffusion", **asked, seed=config.seed)
    return Plan(requests, models.base.settings["resolution"])


class StepsSampler:
    """One actor of the pool: the base model of a cascade, sampled in any way."""

    def __init__(self, cascade: Artifact, files: Store) -> None:
        device = best_device()
        with cascade.local_copy() as folder:
            self.cascade, self.files = Cascade.load(folder, device=device), files

    def __call__(self, job: VariantJob) -> VariantJob:
        write_made(self.files, job, sample_in(self.cascade, job))
        return job


def sample_in(cascade: Cascade, job: VariantJob) -> Made:
    """Images of the base alone by the job's sampler and steps. Raises ValueError if its objective has no such way."""
    base, setting = cascade.base, job.variant
    assert base is not None
    asked = [request._replace(**setting._asdict(), generator="diffusion") for request in job.requests]
    with counted(base.module) as sizes:
        images = replace(cascade, upsamplers=()).sample(asked, batch_size=len(asked))
    return Made(np.stack(images), sum(sizes) / len(images), np.zeros(0, bool))


class Point(NamedTuple):
    """What one setting came to."""

    setting: Setting
    evaluations: float
    distance: float


def points_of(settings: Mapping[str, Setting], made: Mapping[str, Figures], rows: Sequence[DistanceRow]) -> list[Point]:
    distances = {row.name: row.distance for row in rows}
    return [Point(setting, made[name].evaluations, distances[name]) for name, setting in settings.items()]


def draw_steps(
    points: Sequence[Point], rows: Sequence[DistanceRow], config: StepsStudyConfig, *, salt: str
) -> dict[str, str]:
    """Title -> SVG: one line for each sampler, and the reference as a level."""
    reference, distances = reference_of(config), {row.name: row.distance for row in rows}
    lines = {
        sampler: [point for point in points if point.setting.sampler == sampler and point.setting.steps in config.steps]
        for sampler in config.samplers
    }
    panel = Panel(
        "network evaluations an image",
        f"fd_{config.feature_network}",
        [
            Series(sampler, [point.evaluations for point in line], [point.distance for point in line])
            for sampler, line in lines.items()
        ],
        levels={reference.title: distances[reference.name], HELD_OUT: distances[HELD_OUT]},
        log_x=True,
        log_y=True,
    )
    return {f"Distance against network evaluations, N {config.samples}": plot_svg([panel], salt=salt)}


def steps_table(points: Sequence[Point], config: StepsStudyConfig) -> dict[str, Any]:
    """Columns and rows for the report."""
    return {
        "columns": ["sampler", "steps", "network evaluations", f"fd_{config.feature_network}", "N"],
        "rows": [
            [point.setting.sampler, point.setting.steps, point.evaluations, point.distance, config.samples]
            for point in points
        ],
    }


def steps_summary(points: Sequence[Point], config: StepsStudyConfig) -> dict[str, float]:
    """Metric -> distance of each setting."""
    return {f"fd_{config.feature_network}_{point.setting.name}": point.distance for point in points}


def steps_headline(points: Sequence[Point], config: StepsStudyConfig) -> dict[str, float]:
    """The reference, and each sampler at the number of steps in the middle."""
    middle = sorted(config.steps)[len(config.steps) // 2]
    chosen = {Setting(sampler, middle) for sampler in config.samplers} | {reference_of(config)}
    return {
        f"distance, {point.setting.title} (N {config.samples})": point.distance
        for point in points
        if point.setting in chosen
    }
