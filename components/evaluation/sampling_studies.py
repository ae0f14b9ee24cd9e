"""Studies of models sampled in several ways: by sampler, steps of a stage, and kind of guidance.

Samplers are compared by Fréchet distance against the number of network evaluations, guidance by class accuracy and
distance against scale. A classifier of clean images that guides nothing judges whether an image shows the class that
was asked for.
"""

import json
import math
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field

from components.configuration.config import refuse
from components.data.held_out import read_split
from components.data.shards import View
from components.evaluation.generated import SampleJob, load_cascade
from components.evaluation.grids import readable
from components.evaluation.image_sets import HELD_OUT
from components.evaluation.metrics import distance_name, share_error
from components.evaluation.plots import Panel, Series, plot_svg
from components.evaluation.study import (
    Findings,
    Measured,
    V,
    VariantsConfig,
    VariantStudy,
    counted,
    load_trained,
    variants_grid,
)
from components.models.diffusion.steps import SAMPLERS, SamplerName
from components.sampling.cascade import DESCRIPTION, Cascade
from components.sampling.device import best_device
from components.sampling.generators.diffusion import check_guides, class_log_probabilities, sample_guided
from components.sampling.images import from_uint8, to_uint8
from components.sampling.model import SamplingModel
from components.sampling.plan import class_id, plan_of

Method = Literal["classifier", "classifier_unconditional", "classifier_free", "interval", "autoguidance"]
Scale = Annotated[float, Field(ge=0, allow_inf_nan=False)]
TITLES: dict[Method, str] = {
    "classifier": "classifier",
    "classifier_unconditional": "classifier alone",
    "classifier_free": "classifier-free",
    "interval": "classifier-free in an interval",
    "autoguidance": "autoguidance",
}
STAGES = "Fréchet distances by steps of each stage"  # title of the table
JUDGED = 256  # images at a time


class StepsSetting(NamedTuple):
    """Number of steps of a sampler, or of a stage of a cascade."""

    of: str
    steps: int

    @property
    def name(self) -> str:  # for jobs and metrics
        return f"{self.of}_{self.steps}"

    @property
    def words(self) -> str:
        """The stage in words, or the sampler as requests name it."""
        return self.of if self.of in SAMPLERS else readable(self.of)

    @property
    def title(self) -> str:  # for rows of images
        return f"{self.words}, {self.steps} steps"


class CascadeStudy(VariantStudy[V]):
    """Images of a cascade with a diffusion model, made in several ways; the input is `cascade`."""

    by_prompt = True

    def load(self) -> Cascade:
        """The cascade. Raises ValueError if it has no diffusion model."""
        cascade = load_cascade(self.models["cascade"], device=best_device())
        refuse(cascade.base is None, "this cascade has no diffusion model whose samplers could be compared")
        return cascade


def counted_images(cascade: Cascade, model: SamplingModel, job: SampleJob, **changes: Any) -> dict[str, Any]:
    """Images of a job's changed requests by diffusion, and evaluations of one network of the cascade.
    Raises ValueError if the objective has no such sampler."""
    asked = [request.replace(**changes, generator="diffusion") for request in job.requests]
    with counted(model.module) as sizes:
        images = cascade.sample(asked, batch_size=len(asked))
    return {"images": np.stack(images), "evaluations": sum(sizes) / len(images), "correct": np.zeros(0, bool)}


class StepsStudy(CascadeStudy["StepsStudyConfig"]):
    """Images of the base of a cascade by every sampler and number of steps."""

    def settings(self) -> dict[str, StepsSetting]:
        """Name -> setting, the reference last."""
        config = self.config
        chosen = [StepsSetting(sampler, steps) for sampler in config.samplers for steps in sorted(config.steps)]
        return {setting.name: setting for setting in (*chosen, config.reference)}

    def sample(self, models: Cascade, job: SampleJob) -> dict[str, Any]:
        """Images of the base alone by the job's sampler and steps."""
        assert models.base is not None
        sampler, steps = job.variant
        return counted_images(replace(models, upsamplers=()), models.base, job, sampler=sampler, steps=steps)

    def described(self, measured: Measured) -> Findings:
        """A plot with a line for each sampler and the reference as a level; the headline has the middle steps."""
        config, points, lines = self.config, measured.points, []
        network, number, reference = config.feature_network, f"N {config.samples}", points[config.reference.name]
        for sampler in config.samplers:
            line = [points[StepsSetting(sampler, steps).name] for steps in sorted(set(config.steps))]
            lines.append(Series(sampler, [point.evaluations for point in line], [point.distance for point in line]))
        levels = {reference.setting.title: reference.distance, **measured.held_out_distance}
        labels = "network evaluations an image", f"Fréchet distance, {network}"
        panel = Panel(*labels, lines, levels=levels, log_x=True, log_y=True)
        columns = ["sampler", "steps", "network evaluations", labels[1], "N"]
        rows = [[*point.setting, point.evaluations, point.distance, config.samples] for point in points.values()]
        middle = sorted(config.steps)[len(config.steps) // 2]
        chosen = {StepsSetting(sampler, middle) for sampler in config.samplers} | {config.reference}
        shown = [point for point in points.values() if point.setting in chosen]
        return Findings(
            {f"Distance against network evaluations, {number}": plot_svg([panel], salt=self.stage)},
            {"Fréchet distances by sampler and steps": {"columns": columns, "rows": rows}},
            {f"{distance_name(network)}_{name}": point.distance for name, point in points.items()},
            {f"distance, {point.setting.title} ({number})": point.distance for point in shown},
            {"by_steps": variants_grid(points)},
        )


class StepsStudyConfig(VariantsConfig):
    """Samplers and step counts to compare."""

    study: ClassVar[type] = StepsStudy

    samplers: tuple[SamplerName, ...] = Field(("ddpm", "ddim", "dpm_solver_pp", "heun"), min_length=1)
    steps: tuple[Annotated[int, Field(ge=1)], ...] = Field((5, 10, 15, 25, 50), min_length=1)
    reference_sampler: SamplerName = "ddpm"  # sampler of the reference images
    reference_steps: int = Field(250, ge=1)

    @property
    def reference(self) -> StepsSetting:
        """The setting with the reference sampler and its number of steps."""
        return StepsSetting(self.reference_sampler, self.reference_steps)


class StagesStudy(CascadeStudy["StagesStudyConfig"]):
    """Finished images of a cascade by the steps of each stage."""

    @property
    def stages(self) -> list[str]:
        """Names of the base and the upsamplers."""
        stages = json.loads(self.models["cascade"].read(DESCRIPTION))["stages"]
        return ["base", *stages["upsamplers"]]

    def settings(self) -> dict[str, StepsSetting]:
        """Name -> setting."""
        steps = sorted(set(self.config.steps))
        settings = (StepsSetting(stage, count) for stage in self.stages for count in steps)
        return {setting.name: setting for setting in settings}

    def side(self, models: Cascade) -> int:
        """Pixels of a side of the finished images."""
        return models.makers["diffusion"].sides[-1]

    def sample(self, models: Cascade, job: SampleJob) -> dict[str, Any]:
        """Finished images with the job's steps, and evaluations of the job's stage."""
        stage, steps = job.variant
        (model,) = (model for model in models.makers["diffusion"].models if model.name == stage)
        return counted_images(models, model, job, sampling=((stage, "num_inference_steps", steps),))

    def described(self, measured: Measured) -> Findings:
        """A plot with a line for each stage; the headline has the fewest steps and the most."""
        points, count, network = measured.points, self.config.samples, self.config.feature_network
        number, label = f"N {count}", f"Fréchet distance, {network}"
        lines, shown = [], []
        for stage in self.stages:
            own = [point for point in points.values() if point.setting.of == stage]
            line = [point.evaluations for point in own], [point.distance for point in own]
            lines.append(Series(readable(stage), *line))
            shown += [own[0], own[-1]]
        axes = "network evaluations of the stage, an image", label
        panel = Panel(*axes, lines, levels=measured.held_out_distance, log_x=True, log_y=True)
        rows = [[p.setting.words, p.setting.steps, p.evaluations, p.distance, count] for p in points.values()]
        return Findings(
            {f"Distance against steps of each stage, {number}": plot_svg([panel], salt=self.stage)},
            {STAGES: {"columns": ["stage", "steps", "evaluations", label, "N"], "rows": rows}},
            {f"{distance_name(network)}_{name}": point.distance for name, point in points.items()},
            {f"distance, {point.setting.title} ({number})": point.distance for point in shown},
            {"by_stage_steps": variants_grid(points)},
        )


class StagesStudyConfig(VariantsConfig):
    """Step counts of each stage."""

    study: ClassVar[type] = StagesStudy

    steps: tuple[Annotated[int, Field(ge=1)], ...] = Field((2, 4, 8, 16, 32), min_length=1)


class GuidanceSetting(NamedTuple):
    """Guidance method and scale of a way to sample."""

    method: Method
    scale: float

    @property
    def name(self) -> str:
        """Method and scale as a name for jobs and metrics."""
        return "unguided" if self.shared else f"{self.method}_{self.scale:g}".replace(".", "_")

    @property
    def title(self) -> str:
        """Method and scale in words, for tables and rows of images."""
        return "no guidance" if self.shared else f"{TITLES[self.method]}, scale {self.scale:g}"

    @property
    def shared(self) -> bool:
        """True for the unguided conditional model, equal under every method.
        A classifier over an unconditional model starts from less at every scale."""
        return self.scale == off(self.method) and self.method != "classifier_unconditional"


def off(method: Method) -> float:
    """Scale without effect: 0 for a classifier, 1 for the other methods."""
    return 0.0 if method.startswith("classifier") and method != "classifier_free" else 1.0


class Models(NamedTuple):
    """Models of the study: base, judge, and the models that guide where methods need them."""

    base: SamplingModel
    judge: SamplingModel
    weaker: SamplingModel | None = None
    classifier: SamplingModel | None = None


class GuidanceStudy(VariantStudy["GuidanceStudyConfig"]):
    """Images under each guidance and scale, judged; the inputs are those of `Models`."""

    by_prompt = False

    def settings(self) -> dict[str, GuidanceSetting]:
        """Settings by name; a setting shared by several methods appears once."""
        return {setting.name: setting for line in self.config.lines.values() for setting in line}

    def load(self) -> Models:
        """The models. Raises ValueError, with a message of one line, for models that do not fit the base."""
        loaded = {name: load_trained(artifact, name) for name, artifact in self.models.items()}
        models = Models(**loaded)
        for name, model in loaded.items():
            takes, makes = model.settings["resolution"], models.base.settings["resolution"]
            if takes != makes:
                raise ValueError(f"the {name} is a model of {takes}² images, the guided one makes {makes}²")
        if models.classifier is not None:
            check_guides(models.classifier, models.base)
        return models

    def held_out_accuracy(self, models: Models, resolution: int) -> float:
        held_out = read_split(self.index, "holdout", View(resolution), limit=self.config.samples)
        right = judge(models.judge, held_out.image) == held_out.label if held_out.key else np.nan
        return float(np.mean(right))

    def sample(self, models: Models, job: SampleJob) -> dict[str, Any]:
        """Images under the guidance of the job, judged."""
        method, scale = job.variant
        base, chosen = models.base, {"sampler": self.config.sampler, "steps": self.config.num_inference_steps}
        plans = [plan_of(request.replace(**chosen), [base], base.classes) for request in job.requests]
        with counted(base.module) as sizes:
            guided = sample_guided(
                base,
                plans,
                scale=scale,
                weaker=models.weaker if method == "autoguidance" else None,
                classifier=models.classifier if off(method) == 0 else None,
                unconditional=method == "classifier_unconditional",
                interval=self.config.interval if method == "interval" else None,
            )
        images = to_uint8(guided)
        asked = [request.label for request in job.requests if request.label is not None]
        labels = [class_id(label, base.classes) for label in asked]
        correct = judge(models.judge, images) == np.array(labels)
        return {"images": images, "evaluations": sum(sizes) / len(images), "correct": correct}

    def described(self, measured: Measured) -> Findings:
        """Accuracy and distance by scale and each other; the headline has each method's best scale."""
        config, points = self.config, measured.points
        network, count = config.feature_network, config.samples
        accuracy, distance = "accuracy by an independent classifier", f"Fréchet distance, {network}"
        accuracies, distances, each_other, rows, best = [], [], [], [], {}
        apart = {} if math.isnan(measured.held_out_accuracy) else {HELD_OUT: measured.held_out_accuracy}
        for method, settings in config.lines.items():
            title, line = TITLES[method], {setting.scale: points[setting.name] for setting in settings}
            seen, far = [point.accuracy for point in line.values()], [point.distance for point in line.values()]
            accuracies.append(Series(title, list(line), seen))
            distances.append(Series(title, list(line), far))
            each_other.append(Series(title, seen, far))
            rows += [
                [title, scale, p.accuracy, share_error(p.accuracy, len(p.correct)), p.distance, p.evaluations, count]
                for scale, p in line.items()
            ]
            without = line.pop(off(method))
            guided = line.values() or [without]  # no other scale
            best |= {p.setting.title: p for p in (without, min(guided, key=lambda point: point.distance))}
        against_scale = [
            Panel("guidance scale", accuracy, accuracies, levels=apart),
            Panel("guidance scale", distance, distances, levels=measured.held_out_distance),
        ]
        plots = {
            "Accuracy and distance against guidance scale": plot_svg(against_scale, salt=f"{self.stage}-scale"),
            "Distance against accuracy": plot_svg([Panel(accuracy, distance, each_other)], salt=f"{self.stage}-both"),
        }
        columns = ["guidance", "scale", "accuracy", "its standard error", distance]
        table = {"columns": [*columns, "evaluations of the guided network", "N"], "rows": rows}
        summary = {"accuracy_held_out": measured.held_out_accuracy}
        for name, point in points.items():
            summary |= {f"accuracy_{name}": point.accuracy, f"{distance_name(network)}_{name}": point.distance}
        headline = {f"accuracy, {title} (N {count})": point.accuracy for title, point in best.items()}
        headline |= {f"distance, {title} (N {count})": point.distance for title, point in best.items()}
        return Findings(
            {f"{title}, N {count}": svg for title, svg in plots.items()},
            {"Accuracy and Fréchet distance by guidance": table},
            summary,
            headline,
            {"by_guidance": variants_grid(points)},
        )


class GuidanceStudyConfig(VariantsConfig):
    """Kinds of guidance and scales to compare.
    No guidance is always a setting: scale 0 for a classifier, scale 1 for the other kinds."""

    study: ClassVar[type] = GuidanceStudy

    methods: tuple[Method, ...] = Field(("classifier", "classifier_free", "autoguidance"), min_length=1)
    # scales of all kinds but a classifier
    scales: tuple[Scale, ...] = Field((1.5, 2.0, 3.0, 5.0), min_length=1)
    # noise levels, sigma / signal, that the method interval guides at
    interval: tuple[float, float] = (0.2, 5.0)
    classifier_scales: tuple[Scale, ...] = Field((0.5, 1.0, 2.0, 4.0), min_length=1)
    sampler: SamplerName = "ddim"
    num_inference_steps: int = Field(25, ge=1)

    def _check(self) -> None:
        super()._check()
        low, high = self.interval
        refuse(not 0 <= low < high, f"interval must rise from at least 0, not {self.interval}")

    @property
    def lines(self) -> dict[Method, list[GuidanceSetting]]:
        """Settings of each method by ascending scale, with the scale that turns guidance off."""
        chosen = {method: self.scales if off(method) else self.classifier_scales for method in self.methods}
        return {
            method: [GuidanceSetting(method, scale) for scale in sorted({off(method), *scales})]
            for method, scales in chosen.items()
        }


def judge(classifier: SamplingModel, images: np.ndarray) -> np.ndarray:
    """Classes (N,) by a classifier of clean images, for images (N, H, W, 3) uint8."""
    parts = (from_uint8(images[start : start + JUDGED]) for start in range(0, len(images), JUDGED))
    seen = [class_log_probabilities(classifier, part).argmax(dim=1).cpu() for part in parts]
    return torch.cat(seen).numpy()
