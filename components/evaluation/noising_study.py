"""Study of the forward process on real images, and of a trained model's predictions of x_0.

    x_t = sqrt(alphas_cumprod_t) x_0 + sqrt(1 - alphas_cumprod_t) noise      (Ho et al., 2020, equation 4)
Shapes: N images, F times shown, T num_train_timesteps. Times are 0-based indices of the schedule; what is shown counts
noising steps, one more.
"""

from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from components.configuration.config import Config
from components.data.held_out import SplitArrays, read_split
from components.data.shards import View
from components.evaluation.grids import GridBlock, render_blocks
from components.evaluation.likelihood_study import pixels_of
from components.evaluation.plots import Panel, Series, plot_svg
from components.evaluation.restoration import asked_of
from components.evaluation.study import Findings, ModelStudy, StudyPlan, load_trained
from components.models.diffusion import betas
from components.models.diffusion.discrete import DiscreteObjective
from components.models.diffusion.objective import make_objective
from components.models.diffusion.reverse_step import TWO_PEAKS, Mixture, mean_distance
from components.models.diffusion.schedule import Schedule, make_schedule
from components.models.diffusion.steps import spaced_timesteps
from components.sampling.images import from_uint8, to_uint8
from components.sampling.model import SamplingModel, most_at_once
from components.sampling.plan import encode_conditions, plan_of, random_stream

FORWARD, PREDICTED = "forward_noising", "predicted_x_0"  # names of images
VALUES = "Values of x_t as they approach N(0, I)"  # titles of plots
SCHEDULES = "Signal left in x_t: ᾱ of the schedules"
ERRORS = "Error of the predicted x_0"
VARIANCE = "Variance of x_t"  # title of the table
RANGE, BINS = 3.0, 60  # of the histograms: values in [-3, 3]
LEAST_DENSITY = 1e-3  # shown on the logarithmic axis
PAIRS = 2  # images whose predicted x_0 is shown
HISTOGRAM_TIMES, ERROR_TIMES, CURVE_POINTS = 5, 20, 200
SHOWN_VALUES, SHOWN_BETAS = 81, (0.001, 0.01, 0.1, 0.9)  # of reverse steps
BETAS = np.geomspace(1e-4, 0.999, 25).tolist()


class NoisingStudy(ModelStudy["NoisingStudyConfig"]):
    """Held-out images noised step by step, and the x_0 that a model sees in each; the input is `model`.
    There are no jobs: the few images are noised where they are drawn."""

    def findings(self, plan: StudyPlan, measured: Any) -> Findings:
        """Images of both, plots of the values of x_t, of the schedules and of the error of the predicted x_0.
        Raises ValueError for a model that has no such times or needs other models, or a set that holds no image out."""
        config, loaded = self.config, load_trained(self.models["model"])
        objective = discrete_objective(loaded)
        schedule = objective.schedule
        split = self.held_out(resolution=loaded.settings["resolution"], limit=config.samples)
        seen = split.image
        if config.resolution is not None:
            seen = read_split(self.index, "holdout", View(config.resolution), limit=config.shown).image
        noised = with_noise(split.image, seed=config.seed, model=loaded)
        times = times_of(schedule, ERROR_TIMES)
        predicted = (predicted_x_0(loaded, objective, split, noised, time) for time in times)
        errors = [float((x_0 - noised.x_0).square().mean()) for x_0 in predicted]
        line = Series("predicted x_0", [time + 1 for time in times], errors)
        level = {"variance of x_0: the mean guessed": float(noised.x_0.var())}
        error_panel = Panel("noising steps", "mean squared error", [line], levels=level)
        mean = float(np.mean(errors))
        plots = {
            VALUES: draw_values(schedule, noised, salt=f"{self.stage}-values"),
            SCHEDULES: draw_schedules(schedule, salt=f"{self.stage}-schedules"),
            ERRORS: plot_svg([error_panel], salt=f"{self.stage}-errors"),
        }
        shown = with_noise(seen[: config.shown], seed=config.seed)
        images = {FORWARD: draw_forward(schedule, shown, config.frames)}
        images[PREDICTED] = draw_predicted(loaded, objective, split, noised, config.frames)
        summary = {"last_alpha_bar": float(schedule.alphas_cumprod[-1]), "predicted_x_0_error": mean}
        headline = {"mean squared error of the predicted x_0": mean}
        return Findings(plots, {VARIANCE: values_table(schedule, noised)}, summary, headline, images)


class NoisingStudyConfig(Config):
    """Number of held-out images, of shown images and times, and the resolution of shown images."""

    study: ClassVar[type] = NoisingStudy

    samples: int = Field(128, ge=2)  # images that values and errors are computed from
    shown: int = Field(4, ge=1)  # images in a row of their own
    frames: int = Field(8, ge=2)  # times of a row
    resolution: int | None = Field(None, ge=8)  # of the shown images; None: the model's
    seed: int = Field(0, ge=0)


class NoisedImages(NamedTuple):
    """Images, with a fixed noise for every time."""

    x_0: Tensor  # (N, 3, H, W) in [-1, 1], or (N, 1, H, W) of a model of one channel
    noise: Tensor  # like x_0

    def at(self, schedule: Schedule, time: int) -> Tensor:
        """x_t, like x_0, of all images at one time."""
        times = torch.full((len(self.x_0),), time, device=self.x_0.device)
        return schedule.add_noise(self.x_0, self.noise, times)


def discrete_objective(model: SamplingModel) -> DiscreteObjective:
    """Objective of a model with discrete steps. Raises ValueError for any other, or one that needs others."""
    objective = make_objective(model.settings["objective"])
    if not isinstance(objective, DiscreteObjective):
        raise ValueError("only diffusion in discrete steps has these times; give a model with objective discrete")
    if model.settings.get("role", "base") != "base" or "latent_scale" in model.settings:
        raise ValueError(f"{model.name} makes no image of noise alone; noising is studied of a base model of pixels")
    return objective


def with_noise(images: np.ndarray, *, seed: int, model: SamplingModel | None = None) -> NoisedImages:
    """Images (N, H, W, 3) uint8 as x_0, each with noise from a separate stream.
    For a model in its channels and on its device. Raises as `pixels_of`."""
    x_0, device = (from_uint8(images), "cpu") if model is None else (pixels_of(model, images), model.device)
    streams = (random_stream(seed + number, "noising") for number in range(len(x_0)))
    noise = [torch.randn(x_0.shape[1:], generator=stream) for stream in streams]
    return NoisedImages(x_0.to(device), torch.stack(noise).to(device))


def times_of(schedule: Schedule, count: int) -> list[int]:
    """At most `count` evenly spaced times of the schedule."""
    return list(spaced_timesteps(len(schedule), min(count, len(schedule))))


@torch.inference_mode()
def predicted_x_0(
    model: SamplingModel, objective: DiscreteObjective, split: SplitArrays, images: NoisedImages, time: int
) -> Tensor:
    """Model's prediction of x_0 from x_t under each image's own conditions, clipped, like x_0.
    The conditions are those of the first images of the split."""
    asked = asked_of(model, split.label, split.caption)
    plans = [plan_of(request, [model], model.classes) for request in asked]
    x_t, size, made = images.at(objective.schedule, time), most_at_once(images.x_0.shape[-1]), []
    for start in range(0, len(x_t), size):
        part = x_t[start : start + size]
        times = torch.full((len(part),), time, device=part.device)
        conditions = encode_conditions(model, plans[start : start + len(part)]).condition
        output = objective.apply(model.module, part, times, **conditions)
        made.append(objective.predict_x_0(output, x_t=part, time=times).clamp(-1, 1))
    return torch.cat(made)


def values_table(schedule: Schedule, images: NoisedImages) -> dict[str, Any]:
    """Mean and variance of all values of x_t, and the variance from the formula."""
    variance, rows = float(images.x_0.var()), []
    for time in times_of(schedule, HISTOGRAM_TIMES + 1):
        x_t, left = images.at(schedule, time), float(schedule.alphas_cumprod[time])
        rows.append([f"{time + 1}", left, float(x_t.mean()), float(x_t.var()), left * variance + 1 - left])
    columns = ["noising steps", "ᾱ", "mean of x_t", "variance of x_t", "ᾱ var x_0 + 1 − ᾱ"]
    return {"columns": columns, "rows": rows}


def draw_forward(schedule: Schedule, images: NoisedImages, frames: int) -> bytes:
    """Grid with a row for each image: the image, then more and more noise."""
    times = times_of(schedule, frames)
    columns = [to_uint8(images.x_0), *(to_uint8(images.at(schedule, time)) for time in times)]
    blocks = [GridBlock("", list(row)) for row in zip(*columns, strict=True)]
    blocks[-1] = blocks[-1]._replace(captions=["x_0", *map(steps_caption, times)])
    return render_blocks(blocks, columns=len(columns))


def draw_predicted(
    model: SamplingModel, objective: DiscreteObjective, split: SplitArrays, images: NoisedImages, frames: int
) -> bytes:
    """Grid with x_t at several times above the predicted x_0, for each image."""
    times = times_of(objective.schedule, frames)
    first = NoisedImages(images.x_0[:PAIRS], images.noise[:PAIRS])
    x_t = [to_uint8(first.at(objective.schedule, time)) for time in times]
    x_0 = [to_uint8(predicted_x_0(model, objective, split, first, time)) for time in times]
    blocks, captions = [], [steps_caption(time) for time in times]
    for rows in zip(zip(*x_t, strict=True), zip(*x_0, strict=True), strict=True):
        above, below = ("", "") if blocks else ("x_t", "x_0 that the model sees in it")
        blocks += [GridBlock(above, rows[0]), GridBlock(below, rows[1], captions)]
    return render_blocks(blocks, columns=len(times))


def steps_caption(time: int) -> str:
    """Caption of an image at a time, in steps of noise from 1."""
    return "1 step" if time == 0 else f"{time + 1} steps"


def draw_values(schedule: Schedule, images: NoisedImages, *, salt: str) -> str:
    """Plot of the densities of x_t at several times, over the density of a standard normal."""
    edges = np.linspace(-RANGE, RANGE, BINS + 1)
    middle = (edges[1:] + edges[:-1]) / 2
    lines = []
    for time in times_of(schedule, HISTOGRAM_TIMES):
        values = images.at(schedule, time).flatten().cpu().numpy()
        density = np.histogram(values, bins=edges)[0] / (len(values) * (edges[1] - edges[0]))
        lines.append(Series(steps_caption(time), middle.tolist(), np.maximum(density, LEAST_DENSITY).tolist()))
    normal = np.exp(-(middle**2) / 2) / np.sqrt(2 * np.pi)
    lines.append(Series("N(0, 1)", middle.tolist(), normal.tolist()))
    return plot_svg([Panel("value of x_t", "density", lines, log_y=True, markers=False)], salt=salt)


def draw_schedules(schedule: Schedule, *, salt: str) -> str:
    """Plot of remaining signal by step: all schedules of the same length, and the model's own schedule."""
    total = len(schedule)
    names = [name for name, kind in betas.SCHEDULES.items() if kind.too_few_steps < total]
    tables: dict[str, Tensor] = {n: make_schedule(n, num_train_timesteps=total).alphas_cumprod for n in names}
    if not any(torch.allclose(table, schedule.alphas_cumprod) for table in tables.values()):
        tables["the model's"] = schedule.alphas_cumprod
    times = times_of(schedule, CURVE_POINTS)
    lines = [Series(name, [time + 1 for time in times], table[times].tolist()) for name, table in tables.items()]
    return plot_svg([Panel("noising steps", "ᾱ", lines, markers=False)], salt=salt)


def draw_reverse_step(before: Mixture = TWO_PEAKS) -> dict[str, str]:
    """Plots (title -> SVG) of the reverse step's distance from its Gaussian over beta, and of some steps."""
    between = float(before.weights @ before.means)
    steps = [before.reversed(between, beta) for beta in BETAS]
    lines = [
        Series("x_t between the two Gaussians", BETAS, [step.distance_from_gaussian() for step in steps]),
        Series("mean over x_t", BETAS, [mean_distance(before, beta) for beta in BETAS]),
    ]
    itself = {"the data: no step at all": before.distance_from_gaussian()}
    distances = Panel("β", "total variation distance", lines, levels=itself, log_x=True, markers=False)
    shown = {f"β = {beta:g}": before.reversed(between, beta) for beta in SHOWN_BETAS}
    drawn = []
    for name, step in (shown | {"its Gaussian": before.gaussian()}).items():
        near, values = step.gaussian(), step.grid(SHOWN_VALUES, deviations=3.0)
        seen, scale = near if name == "its Gaussian" else step, np.sqrt(near.variance)
        drawn.append(Series(name, ((values - near.means) / scale).tolist(), (seen.density(values) * scale).tolist()))
    densities = Panel("x_{t−1} in deviations from its mean", "density", drawn, markers=False)
    return {
        "Distance of the reverse step from a Gaussian": plot_svg([distances], salt="reverse-distances"),
        "The reverse step from x_t between the two Gaussians": plot_svg([densities], salt="reverse-densities"),
    }
