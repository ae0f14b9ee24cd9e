"""Study of Fréchet distance by number of network evaluations, of every sampler of one model."""

from dataclasses import replace
from typing import Annotated, NamedTuple

import numpy as np
from pydantic import Field

from components.evaluation.generated import SampleJob
from components.evaluation.image_sets import HELD_OUT
from components.evaluation.plots import Panel, Series, plot_svg
from components.evaluation.study import (
    Findings,
    Made,
    Measured,
    VariantsConfig,
    VariantStudy,
    counted,
    variants_grid,
)
from components.models.diffusion.steps import SamplerName
from components.sampling.cascade import Cascade
from components.sampling.device import best_device


class SamplerSetting(NamedTuple):
    """Sampler and number of steps of a way to sample."""

    sampler: SamplerName
    steps: int

    @property
    def name(self) -> str:
        """Sampler and steps as a name for jobs and metrics."""
        return f"{self.sampler}_{self.steps}"

    @property
    def title(self) -> str:
        """Sampler and steps in words, for tables and rows of images."""
        return f"{self.sampler}, {self.steps} steps"


class StepsStudyConfig(VariantsConfig):
    """Samplers and step counts to compare."""

    samplers: tuple[SamplerName, ...] = Field(("ddpm", "ddim", "dpm_solver_pp", "heun"), min_length=1)
    steps: tuple[Annotated[int, Field(ge=1)], ...] = Field((5, 10, 15, 25, 50), min_length=1)
    reference_sampler: SamplerName = "ddpm"  # sampler of the reference images
    reference_steps: int = Field(250, ge=1)

    @property
    def reference(self) -> SamplerSetting:
        """The setting with the reference sampler and its number of steps."""
        return SamplerSetting(self.reference_sampler, self.reference_steps)

    @property
    def study(self) -> "type[StepsStudy]":
        """The study of this configuration."""
        return StepsStudy


class StepsStudy(VariantStudy[StepsStudyConfig]):
    """Images of the base of a cascade by every sampler and number of steps; the input is `cascade`."""

    by_prompt = True

    def settings(self) -> dict[str, SamplerSetting]:
        """Name -> setting, the reference last."""
        config = self.config
        chosen = [SamplerSetting(sampler, steps) for sampler in config.samplers for steps in sorted(config.steps)]
        return {setting.name: setting for setting in (*chosen, config.reference)}

    def load(self) -> Cascade:
        """The cascade. Raises ValueError if it has no diffusion model."""
        with self.models["cascade"].local_copy() as folder:
            cascade = Cascade.load(folder, device=best_device())
        if cascade.base is None:
            raise ValueError("this cascade has no diffusion model whose samplers could be compared")
        return cascade

    def sample(self, models: Cascade, job: SampleJob) -> Made:
        """Images of the base alone by the job's sampler and steps.

        Raises ValueError if the objective has no such sampler.
        """
        assert models.base is not None
        asked = [request.replace(**job.variant._asdict(), generator="diffusion") for request in job.requests]
        with counted(models.base.module) as sizes:
            images = replace(models, upsamplers=()).sample(asked, batch_size=len(asked))
        return Made(np.stack(images), sum(sizes) / len(images), np.zeros(0, bool))

    def described(self, measured: Measured) -> Findings:
        """A plot with a line for each sampler and the reference as a level; the headline has the middle steps."""
        config, points = self.config, measured.points
        network, number, reference = config.feature_network, f"N {config.samples}", points[config.reference.name]
        steps, lines = sorted(set(config.steps)), []
        for sampler in config.samplers:
            line = [points[SamplerSetting(sampler, each).name] for each in steps]
            lines.append(Series(sampler, [point.evaluations for point in line], [point.distance for point in line]))
        levels = {reference.setting.title: reference.distance, HELD_OUT: measured.held_out_distance}
        labels = "network evaluations an image", f"Fréchet distance, {network}"
        panel = Panel(*labels, lines, levels=levels, log_x=True, log_y=True)
        columns = ["sampler", "steps", "network evaluations", labels[1], "N"]
        rows = [[*point.setting, point.evaluations, point.distance, config.samples] for point in points.values()]
        middle = sorted(config.steps)[len(config.steps) // 2]
        chosen = {SamplerSetting(sampler, middle) for sampler in config.samplers} | {config.reference}
        shown = [point for point in points.values() if point.setting in chosen]
        return Findings(
            {f"Distance against network evaluations, {number}": plot_svg([panel], salt=self.stage)},
            {"Fréchet distances by sampler and steps": {"columns": columns, "rows": rows}},
            {f"fd_{network}_{name}": point.distance for name, point in points.items()},
            {f"distance, {point.setting.title} ({number})": point.distance for point in shown},
            {"by_steps": variants_grid(points)},
        )
