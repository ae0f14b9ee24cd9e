"""Study of class accuracy and Fréchet distance against the scale of each kind of guidance.

A classifier of clean images that guides nothing judges whether an image shows the class that was asked for.
"""

from typing import Annotated, Literal, NamedTuple, Self

import numpy as np
import torch
from pydantic import Field, model_validator

from components.data.held_out import held_out_arrays
from components.data.shards import View
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
    load_trained,
    variants_grid,
)
from components.models.diffusion.steps import SamplerName
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
JUDGED = 256  # images at a time


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

        A classifier over an unconditional model starts from less at every scale.
        """
        return self.scale == off(self.method) and self.method != "classifier_unconditional"


def off(method: Method) -> float:
    """Scale without effect: 0 for a classifier, 1 for the other methods."""
    return 0.0 if method.startswith("classifier") and method != "classifier_free" else 1.0


class GuidanceStudyConfig(VariantsConfig):
    """Kinds of guidance and scales to compare.

    No guidance is always a setting: scale 0 for a classifier, scale 1 for the other kinds.
    """

    methods: tuple[Method, ...] = Field(("classifier", "classifier_free", "autoguidance"), min_length=1)
    scales: tuple[Scale, ...] = Field((1.5, 2.0, 3.0, 5.0), min_length=1)  # scales of all kinds but a classifier
    interval: tuple[float, float] = (0.2, 5.0)  # noise levels, sigma / signal, that the method interval guides at
    classifier_scales: tuple[Scale, ...] = Field((0.5, 1.0, 2.0, 4.0), min_length=1)
    sampler: SamplerName = "ddim"
    num_inference_steps: int = Field(25, ge=1)

    @model_validator(mode="after")
    def _interval_rises(self) -> Self:
        if not 0 <= self.interval[0] < self.interval[1]:
            raise ValueError(f"interval must rise from at least 0, not {self.interval}")
        return self

    @property
    def lines(self) -> dict[Method, list[GuidanceSetting]]:
        """Settings of each method by ascending scale, with the scale that turns guidance off."""
        chosen = {method: self.scales if off(method) else self.classifier_scales for method in self.methods}
        return {
            method: [GuidanceSetting(method, scale) for scale in sorted({off(method), *scales})]
            for method, scales in chosen.items()
        }

    @property
    def study(self) -> "type[GuidanceStudy]":
        """The study of this configuration."""
        return GuidanceStudy


class Models(NamedTuple):
    """Models of the study: base, judge, and the models that guide where methods need them."""

    base: SamplingModel
    judge: SamplingModel
    weaker: SamplingModel | None = None
    classifier: SamplingModel | None = None


class GuidanceStudy(VariantStudy[GuidanceStudyConfig]):
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
        """Accuracy of the judge on held-out images."""
        held_out = held_out_arrays(self.index, View(resolution), limit=self.config.samples)
        return float(np.mean(judge(models.judge, held_out["image"]) == held_out["label"]))

    def sample(self, models: Models, job: SampleJob) -> Made:
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
        labels = [class_id(request.label, base.classes) for request in job.requests if request.label is not None]
        return Made(images, sum(sizes) / len(images), judge(models.judge, images) == np.array(labels))

    def described(self, measured: Measured) -> Findings:
        """Accuracy and distance by scale and each other; the headline has each method's best scale."""
        config, points = self.config, measured.points
        lines = {method: [points[setting.name] for setting in line] for method, line in config.lines.items()}
        network, count = config.feature_network, config.samples
        accuracy, distance = "accuracy by an independent classifier", f"Fréchet distance, {network}"
        accuracies, distances, each_other, rows, best = [], [], [], [], {}
        for method, line in lines.items():
            title, scales = TITLES[method], [setting.scale for setting in config.lines[method]]
            seen, far = [point.accuracy for point in line], [point.distance for point in line]
            accuracies.append(Series(title, scales, seen))
            distances.append(Series(title, scales, far))
            each_other.append(Series(title, seen, far))
            rows += [
                [title, scale, p.accuracy, p.accuracy_standard_error, p.distance, p.evaluations, count]
                for scale, p in zip(scales, line, strict=True)
            ]
            without = next(p for scale, p in zip(scales, line, strict=True) if scale == off(method))
            guided = [p for scale, p in zip(scales, line, strict=True) if scale != off(method)]
            best |= {p.setting.title: p for p in (without, min(guided, key=lambda point: point.distance))}
        against_scale = [
            Panel("guidance scale", accuracy, accuracies, levels={HELD_OUT: measured.held_out_accuracy}),
            Panel("guidance scale", distance, distances, levels={HELD_OUT: measured.held_out_distance}),
        ]
        plots = {
            "Accuracy and distance against guidance scale": plot_svg(against_scale, salt=f"{self.stage}-scale"),
            "Distance against accuracy": plot_svg([Panel(accuracy, distance, each_other)], salt=f"{self.stage}-both"),
        }
        columns = ["guidance", "scale", "accuracy", "its standard error", distance]
        table = {"columns": [*columns, "evaluations of the guided network", "N"], "rows": rows}
        summary = {"accuracy_held_out": measured.held_out_accuracy}
        for name, point in points.items():
            summary |= {f"accuracy_{name}": point.accuracy, f"fd_{network}_{name}": point.distance}
        headline = {f"accuracy, {title} (N {count})": point.accuracy for title, point in best.items()}
        headline |= {f"distance, {title} (N {count})": point.distance for title, point in best.items()}
        return Findings(
            {f"{title}, N {count}": svg for title, svg in plots.items()},
            {"Accuracy and Fréchet distance by guidance": table},
            summary,
            headline,
            {"by_guidance": variants_grid(points)},
        )


def judge(classifier: SamplingModel, images: np.ndarray) -> np.ndarray:
    """Classes (N,) by a classifier of clean images, for images (N, H, W, 3) uint8."""
    parts = (from_uint8(images[start : start + JUDGED]) for start in range(0, len(images), JUDGED))
    return torch.cat([class_log_probabilities(classifier, part).argmax(dim=1).cpu() for part in parts]).numpy()
