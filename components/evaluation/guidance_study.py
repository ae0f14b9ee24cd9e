"""Study of class accuracy and Fréchet distance against guidance scale.

Compares each kind of guidance of a single trained model.

Whether an image shows the class that was asked for is judged by a classifier of clean images that guides nothing.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from components.data.held_out import held_out_arrays
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
from components.sampling.generators.diffusion import sample_guided
from components.sampling.guides import check_guides, class_log_probabilities
from components.sampling.images import from_uint8, to_uint8
from components.sampling.model import SamplingModel, load_model
from components.sampling.plan import plan_of
from components.sampling.requests import class_id

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


class GuidanceSetting(NamedTuple):
    """Guidance method and scale of a way to sample."""

    method: Method
    scale: float

    @property
    def name(self) -> str:  # of jobs and metrics
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


class Models(NamedTuple):
    """Models of the study: base, judge, and the models that guide."""

    base: SamplingModel
    judge: SamplingModel
    weaker: SamplingModel | None = None
    classifier: SamplingModel | None = None


def off(method: Method) -> float:
    """Scale without effect: 0 for a classifier, 1 for the other methods."""
    return 0.0 if method.startswith("classifier") and method != "classifier_free" else 1.0


def scales_of(config: GuidanceStudyConfig, method: Method) -> list[float]:
    """Scales of a method, ascending, with the scale that turns guidance off."""
    chosen = config.classifier_scales if off(method) == 0 else config.scales
    return sorted({off(method), *chosen})


def settings_of(config: GuidanceStudyConfig) -> dict[str, GuidanceSetting]:
    """Settings by name; a setting shared by several methods appears once."""
    every = [GuidanceSetting(method, scale) for method in config.methods for scale in scales_of(config, method)]
    return {setting.name: setting for setting in every}


def plan_study(config: GuidanceStudyConfig, models: Mapping[str, Artifact], index: ShardIndex) -> StudyPlan:
    """Requests with labels of training images, and the judge's accuracy on held-out images.

    Runs in a worker. Raises as `load_models`.
    """
    loaded = load_models(models)
    size = loaded.base.settings["resolution"]
    requests = study_requests(config, index, Cascade(base=loaded.base), prompts=False)
    held_out = held_out_arrays(index, resolution=size, limit=config.samples)
    accuracy = float(np.mean(judge(loaded.judge, held_out["image"]) == held_out["label"]))
    return StudyPlan(requests, size, accuracy)


def load_models(models: Mapping[str, Artifact]) -> Models:
    """Loads the fields of `Models` on the best available device.

    Raises ValueError, with a message of one line, for models that do not fit the base.
    """
    loaded, device = {}, best_device()
    for name, artifact in models.items():
        with artifact.local_copy() as folder:
            loaded[name] = load_model(name, folder, device=device)
    found = Models(**loaded)
    for name, model in loaded.items():
        takes, makes = model.settings["resolution"], found.base.settings["resolution"]
        if takes != makes:
            raise ValueError(f"the {name} is a model of {takes}² images, the guided one makes {makes}²")
    if found.classifier is not None:
        check_guides(found.classifier, found.base)
    return found


def sample_in(models: Models, job: VariantJob, *, config: GuidanceStudyConfig) -> Made:
    """Images under the guidance of the job, judged."""
    method, scale = job.variant
    base, chosen = models.base, {"sampler": config.sampler, "steps": config.num_inference_steps}
    plans = [plan_of(request.replace(**chosen), [base], base.classes) for request in job.requests]
    with counted(models.base.module) as sizes:
        images = sample_guided(
            base,
            plans,
            scale=scale,
            weaker=models.weaker if method == "autoguidance" else None,
            classifier=models.classifier if off(method) == 0 else None,
            unconditional=method == "classifier_unconditional",
            interval=config.interval if method == "interval" else None,
        )
    images = to_uint8(images)
    return Made(images, sum(sizes) / len(images), judge(models.judge, images) == labels_of(models.base, job))


def labels_of(model: SamplingModel, job: VariantJob) -> np.ndarray:  # (N,)
    """Class ids (N,) of the job's requests, by id or by name of a class."""
    labels = [request.label for request in job.requests if request.label is not None]
    return np.array([class_id(label, model.classes) for label in labels])


def judge(classifier: SamplingModel, images: np.ndarray) -> np.ndarray:
    """Classes (N,) by a classifier of clean images, for images (N, H, W, 3) uint8."""
    seen: list[Tensor] = []
    for start in range(0, len(images), JUDGED):
        image = from_uint8(images[start : start + JUDGED])
        seen.append(class_log_probabilities(classifier, image).argmax(dim=1).cpu())
    return torch.cat(seen).numpy()


def draw_guidance(found: Measured, config: GuidanceStudyConfig, *, salt: str) -> dict[str, str]:
    """Plots by title, SVG: accuracy and distance against scale, and accuracy against distance."""
    distance, accuracy = f"Fréchet distance, {config.feature_network}", "accuracy by an independent classifier"
    accuracies, distances, each_other = [], [], []
    for method in config.methods:
        title, scales = TITLES[method], scales_of(config, method)
        line = [found.points[GuidanceSetting(method, scale).name] for scale in scales]
        seen, far = [point.accuracy for point in line], [point.distance for point in line]
        accuracies.append(Series(title, scales, seen))
        distances.append(Series(title, scales, far))
        each_other.append(Series(title, seen, far))
    against_scale = [
        Panel("guidance scale", accuracy, accuracies, levels={HELD_OUT: found.held_out_accuracy}),
        Panel("guidance scale", distance, distances, levels={HELD_OUT: found.held_out_distance}),
    ]
    number = f"N {config.samples}"
    return {
        f"Accuracy and distance against guidance scale, {number}": plot_svg(against_scale, salt=f"{salt}-scale"),
        f"Distance against accuracy, {number}": plot_svg([Panel(accuracy, distance, each_other)], salt=f"{salt}-both"),
    }


def guidance_table(found: Measured, config: GuidanceStudyConfig) -> dict[str, Any]:
    """Columns and rows for the report: accuracy, distance and evaluations by method and scale."""
    return {
        "columns": [
            *("guidance", "scale", "accuracy", "its standard error", f"Fréchet distance, {config.feature_network}"),
            *("evaluations of the guided network", "N"),
        ],
        "rows": [
            [TITLES[method], scale, p.accuracy, p.accuracy_standard_error, p.distance, p.evaluations, config.samples]
            for method in config.methods
            for scale in scales_of(config, method)
            for p in [found.points[GuidanceSetting(method, scale).name]]
        ],
    }


def guidance_summary(found: Measured, config: GuidanceStudyConfig) -> dict[str, float]:
    """Metrics of the study: accuracy and distance of each setting, and accuracy on held-out images."""
    figures = {"accuracy_held_out": found.held_out_accuracy}
    for name, point in found.points.items():
        figures |= {f"accuracy_{name}": point.accuracy, f"fd_{config.feature_network}_{name}": point.distance}
    return figures


def guidance_headline(found: Measured, config: GuidanceStudyConfig) -> dict[str, float]:
    """Accuracy and distance without guidance, and at each method's scale of smallest distance."""
    chosen = {}
    for method in config.methods:
        scales = [scale for scale in scales_of(config, method) if scale != off(method)]
        without = found.points[GuidanceSetting(method, off(method)).name]
        best = min(
            (found.points[GuidanceSetting(method, scale).name] for scale in scales), key=lambda point: point.distance
        )
        chosen |= {point.setting.title: point for point in (without, best)}
    accuracies = {f"accuracy, {title} (N {config.samples})": point.accuracy for title, point in chosen.items()}
    return accuracies | {f"distance, {title} (N {config.samples})": point.distance for title, point in chosen.items()}
