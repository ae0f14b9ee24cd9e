"""Class accuracy and Fréchet distance against the guidance scale, for each kind of guidance of one trained model.

Whether an image shows the class that was asked for is judged by a classifier of clean images that guides nothing.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from components.data.held_out import held_out_arrays
from components.data.shards import ShardIndex
from components.data.subset import read_random_part
from components.diffusion.samplers import SamplerName
from components.evaluation.generated import measured_requests
from components.evaluation.measure import DistanceRow
from components.evaluation.plots import Panel, Series, plot_svg
from components.evaluation.variants import HELD_OUT, Figures, Made, VariantJob, VariantsConfig, counted, write_made
from components.sampling.cascade import Cascade
from components.sampling.classifier import check_guides, class_log_probabilities
from components.sampling.device import best_device
from components.sampling.guided import sample_guided
from components.sampling.images import from_uint8, to_uint8
from components.sampling.model import SamplingModel, load_model
from components.sampling.requests import Request, class_id
from components.storage.artifact import Artifact
from components.storage.store import Store

Method = Literal["classifier", "classifier_unconditional", "classifier_free", "autoguidance"]
Scale = Annotated[float, Field(ge=0, allow_inf_nan=False)]
TITLES: dict[Method, str] = {
    "classifier": "classifier",
    "classifier_unconditional": "classifier alone",
    "classifier_free": "classifier-free",
    "autoguidance": "autoguidance",
}
JUDGED = 256  # images at a time
SMALL = 8  # pixels: only labels are wanted


class GuidanceStudyConfig(VariantsConfig):
    """Which kinds of guidance at which scales. No guidance is always there: scale 0 of a classifier, 1 of others."""

    methods: tuple[Method, ...] = Field(("classifier", "classifier_free", "autoguidance"), min_length=1)
    scales: tuple[Scale, ...] = Field((1.5, 2.0, 3.0, 5.0), min_length=1)  # of classifier-free guidance, autoguidance
    classifier_scales: tuple[Scale, ...] = Field((0.5, 1.0, 2.0, 4.0), min_length=1)
    sampler: SamplerName = "ddim"
    num_inference_steps: int = Field(25, ge=1)


class Setting(NamedTuple):
    """One way to sample."""

    method: Method
    scale: float

    @property
    def name(self) -> str:  # of jobs and metrics
        return "unguided" if self.shared else f"{self.method}_{self.scale:g}".replace(".", "_")

    @property
    def title(self) -> str:
        return "no guidance" if self.shared else f"{TITLES[self.method]}, scale {self.scale:g}"

    @property
    def shared(self) -> bool:
        """Whether this is the conditional model as it is, by whatever method. Alone, a classifier starts from less."""
        return self.scale == off(self.method) and self.method != "classifier_unconditional"


class Models(NamedTuple):
    """What guides, and what judges."""

    base: SamplingModel
    judge: SamplingModel
    weaker: SamplingModel | None = None
    classifier: SamplingModel | None = None


def off(method: Method) -> float:
    """The scale that changes nothing."""
    return 0.0 if method.startswith("classifier") and method != "classifier_free" else 1.0


def scales_of(config: GuidanceStudyConfig, method: Method) -> list[float]:
    """Ascending, with the one that is off."""
    chosen = config.classifier_scales if off(method) == 0 else config.scales
    return sorted({off(method), *chosen})


def settings_of(config: GuidanceStudyConfig) -> dict[str, Setting]:
    """Name -> setting; what several methods share is there once."""
    every = [Setting(method, scale) for method in config.methods for scale in scales_of(config, method)]
    return {setting.name: setting for setting in every}


class GuidedSampler:
    """One actor of the pool."""

    def __init__(self, config: GuidanceStudyConfig, models: Mapping[str, Artifact], files: Store) -> None:
        device = best_device()
        self.config, self.files, self.models = config, files, load_models(models, device=device)

    def __call__(self, job: VariantJob) -> VariantJob:
        write_made(self.files, job, sample_in(self.models, job, self.config))
        return job


class Plan(NamedTuple):
    """What a study starts from."""

    requests: list[Request]
    resolution: int
    held_out_accuracy: float  # of the judge


def plan_study(config: GuidanceStudyConfig, index: ShardIndex, models: Mapping[str, Artifact]) -> Plan:
    """Requests with the labels of training images, and what the judge sees in held-out ones. Runs in a worker. Raises
    ValueError for models that do not fit each other."""
    loaded = load_models(models, device=best_device())
    size = loaded.base.settings["resolution"]
    labels = read_random_part(index, samples=config.reference_samples, seed=config.seed, resolution=SMALL).label
    asked: dict[str, Any] = {"labels": labels, "captions": [""] * len(labels), "count": config.samples}
    requests = measured_requests(Cascade(base=loaded.base), "diffusion", **asked, seed=config.seed)
    held_out = held_out_arrays(index, resolution=size, limit=config.samples)
    accuracy = float(np.mean(judge(loaded.judge, held_out["image"]) == held_out["label"]))
    return Plan(requests, size, accuracy)


def load_models(models: Mapping[str, Artifact], *, device: str | torch.device = "cpu") -> Models:
    """The fields of `Models` from artifacts. Raises ValueError, in one line, if they do not fit the base."""
    loaded = {}
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


def sample_in(models: Models, job: VariantJob, config: GuidanceStudyConfig) -> Made:
    """Images under the guidance of the job, judged."""
    method, scale = job.variant
    asked = [request._replace(sampler=config.sampler, steps=config.num_inference_steps) for request in job.requests]
    with counted(models.base.module) as sizes:
        images = sample_guided(
            models.base,
            asked,
            scale=scale,
            weaker=models.weaker if method == "autoguidance" else None,
            classifier=models.classifier if off(method) == 0 else None,
            unconditional=method == "classifier_unconditional",
        )
    images = to_uint8(images)
    return Made(images, sum(sizes) / len(images), judge(models.judge, images) == labels_of(models.base, job))


def labels_of(model: SamplingModel, job: VariantJob) -> np.ndarray:  # (N,)
    labels = [request.label for request in job.requests if request.label is not None]
    return np.array([class_id(label, model.classes) for label in labels])


def judge(classifier: SamplingModel, images: np.ndarray) -> np.ndarray:
    """The class (N,) that a classifier sees in images (N, H, W, 3) uint8."""
    seen: list[Tensor] = []
    for start in range(0, len(images), JUDGED):
        image = from_uint8(images[start : start + JUDGED])
        seen.append(class_log_probabilities(classifier, image).argmax(dim=1).cpu())
    return torch.cat(seen).numpy()


class Point(NamedTuple):
    """What one setting came to."""

    setting: Setting
    accuracy: float
    accuracy_standard_error: float
    distance: float
    evaluations: float


def points_of(
    settings: Mapping[str, Setting], made: Mapping[str, Figures], rows: Sequence[DistanceRow]
) -> dict[str, Point]:
    """Name of the setting -> point."""
    distances, points = {row.name: row.distance for row in rows}, {}
    for name, setting in settings.items():
        accuracy, count = float(made[name].correct.mean()), len(made[name].correct)
        error = (accuracy * (1 - accuracy) / count) ** 0.5
        points[name] = Point(setting, accuracy, error, distances[name], made[name].evaluations)
    return points


def draw_guidance(
    points: Mapping[str, Point],
    rows: Sequence[DistanceRow],
    config: GuidanceStudyConfig,
    *,
    held_out_accuracy: float,
    salt: str,
) -> dict[str, str]:
    """Title -> SVG: accuracy and distance against scale, and against each other."""
    distance, accuracy = f"fd_{config.feature_network}", "accuracy by an independent classifier"
    held_out = {row.name: row.distance for row in rows}[HELD_OUT]
    accuracies, distances, each_other = [], [], []
    for method in config.methods:
        title, scales = TITLES[method], scales_of(config, method)
        line = [points[Setting(method, scale).name] for scale in scales]
        seen, far = [point.accuracy for point in line], [point.distance for point in line]
        accuracies.append(Series(title, scales, seen))
        distances.append(Series(title, scales, far))
        each_other.append(Series(title, seen, far))
    against_scale = [
        Panel("guidance scale", accuracy, accuracies, levels={HELD_OUT: held_out_accuracy}),
        Panel("guidance scale", distance, distances, levels={HELD_OUT: held_out}),
    ]
    number = f"N {config.samples}"
    return {
        f"Accuracy and distance against guidance scale, {number}": plot_svg(against_scale, salt=f"{salt}-scale"),
        f"Distance against accuracy, {number}": plot_svg([Panel(accuracy, distance, each_other)], salt=f"{salt}-both"),
    }


def guidance_table(points: Mapping[str, Point], config: GuidanceStudyConfig) -> dict[str, Any]:
    """Columns and rows for the report."""
    return {
        "columns": [
            *("guidance", "scale", "accuracy", "its standard error", f"fd_{config.feature_network}"),
            *("evaluations of the guided network", "N"),
        ],
        "rows": [
            [TITLES[method], scale, p.accuracy, p.accuracy_standard_error, p.distance, p.evaluations, config.samples]
            for method in config.methods
            for scale in scales_of(config, method)
            for p in [points[Setting(method, scale).name]]
        ],
    }


def guidance_summary(
    points: Mapping[str, Point], config: GuidanceStudyConfig, *, held_out_accuracy: float
) -> dict[str, float]:
    """Metrics: accuracy and distance of each setting, and what the judge sees in held-out images."""
    found = {"accuracy_held_out": held_out_accuracy}
    for name, point in points.items():
        found |= {f"accuracy_{name}": point.accuracy, f"fd_{config.feature_network}_{name}": point.distance}
    return found


def guidance_headline(points: Mapping[str, Point], config: GuidanceStudyConfig) -> dict[str, float]:
    """Accuracy and distance without guidance, and by each method at the scale of its smallest distance."""
    chosen = {}
    for method in config.methods:
        scales = [scale for scale in scales_of(config, method) if scale != off(method)]
        without = points[Setting(method, off(method)).name]
        best = min((points[Setting(method, scale).name] for scale in scales), key=lambda point: point.distance)
        chosen |= {point.setting.title: point for point in (without, best)}
    found = {f"accuracy, {title} (N {config.samples})": point.accuracy for title, point in chosen.items()}
    return found | {f"distance, {title} (N {config.samples})": point.distance for title, point in chosen.items()}
