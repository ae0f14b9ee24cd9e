"""A study of trained models: variants × requests → images → measures → rows → table, plot and figures.

A study is a class: what is sampled, in jobs that each leave a file; which images are measured; what is found. The stage
of all studies (`components/stages/studies.py`) runs it. The studies that sample one model in several ways, from equal
seeds and conditions, share `VariantStudy`.

Shapes: N images, H W their pixels.
"""

import io
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import numpy as np
from pydantic import Field, field_validator
from torch import nn

from components.configuration.config import Config
from components.data.held_out import SplitArrays, read_random_part, read_split
from components.data.shards import ShardIndex, View
from components.evaluation.features import FeatureNetwork, read_arrays
from components.evaluation.generated import CascadeSampler, SampleJob, jobs_of, measured_requests
from components.evaluation.grids import GridBlock, render_blocks
from components.evaluation.image_sets import HELD_OUT, REFERENCE, FileImages, ImageSet, held_out_parts, trained_parts
from components.evaluation.measure import MeasureConfig, measure_distances
from components.runtime.pool import Pool, file_name, write_job
from components.runtime.storage.artifact import Artifact
from components.runtime.storage.store import Store
from components.sampling.cascade import Cascade
from components.sampling.device import best_device
from components.sampling.model import SamplingModel, load_model
from components.sampling.requests import Request

SHOWN = 8  # images of each way
SMALL = 8  # pixels: only labels and captions are wanted
C = TypeVar("C", bound=Config)


class Findings(NamedTuple):
    """All that a study leaves, as `StageContext.commit_study` takes it."""

    plots: dict[str, str]  # title -> SVG
    tables: dict[str, dict[str, Any]]  # title -> columns and rows
    summary: dict[str, float]  # metric -> figure
    headline: dict[str, float]  # the few figures by which the study is known, in words -> figure
    images: dict[str, bytes]  # name -> PNG


class StudyPlan(NamedTuple):
    """The jobs of a study, and facts for the study's own later steps."""

    jobs: list[Any]
    facts: Any = None


@dataclass(frozen=True)
class ModelStudy(ABC, Generic[C]):
    """A study with its configuration and models. All methods but `measure` run in workers."""

    config: C
    index: ShardIndex
    models: Mapping[str, Artifact]
    files: Store  # of the jobs
    stage: str  # its name: makes ids of plots its own

    @abstractmethod
    def plan(self) -> StudyPlan:
        """The jobs. Raises ValueError, with a message of one line, for models or images that do not fit."""

    def worker(self) -> Callable[[Any], Any]:
        """Pool worker that does a job: samples requests of the cascade."""
        return CascadeSampler(self.models["cascade"], self.files)

    def images_of(self, job: Any) -> int:
        """Number of images of a job."""
        return len(job.requests)

    def sets(self, plan: StudyPlan) -> dict[str, ImageSet]:
        """Sets of images to measure distances of; none for a study without distances."""
        return {}

    def measure(self, plan: StudyPlan, pool: Pool, **work: Any) -> Any:
        """Measures the finished jobs' images: distance by name of the set; `work` as for `measure_features`."""
        config, sets = self.config, self.sets(plan)
        if not isinstance(config, MeasureConfig) or config.feature_network == "none" or not sets:
            return {}
        return {row.name: row.distance for row in measure_distances(sets, config, pool=pool, **work)}

    @abstractmethod
    def findings(self, plan: StudyPlan, measured: Any) -> Findings:
        """Plots, tables and figures of the finished jobs and the measures."""

    def made_sets(self, jobs: Mapping[str, Sequence[Any]], array: str, *, resolution: int) -> dict[str, ImageSet]:
        """Training images as the reference, and an array of the files of each group of jobs."""
        config = self.config
        assert isinstance(config, MeasureConfig)
        count, seed = config.reference_samples, config.seed
        trained = trained_parts(self.index, samples=count, seed=seed, resolution=resolution)
        sets = {REFERENCE: ImageSet(tuple(trained), "scale")}
        for name, group in jobs.items():
            parts = [FileImages(self.files, file_name(job.name), array, len(job.requests)) for job in group]
            sets[name] = ImageSet(tuple(parts), "model")
        return sets

    def held_out(self, *, resolution: int, limit: int) -> SplitArrays:
        """The first held-out images. Raises ValueError for a set that holds none out."""
        split = read_split(self.index, "holdout", View(resolution), limit=limit)
        if not split.key:
            raise ValueError(f"{self.index.source} holds no image out; set images.holdout_fraction")
        return split


class ArrayWorker:
    """Pool worker with the models from `load`; the arrays that `make` makes of a job are the job's file."""

    def __init__(self, load: Callable[[], Any], make: Callable[[Any, Any], Any], files: Store) -> None:
        self.models, self.make, self.files = load(), make, files

    def __call__(self, job: Any) -> None:
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **self.make(self.models, job)._asdict())
        write_job(self.files, job.name, buffer.getvalue())


def load_trained(model: Artifact, name: str | None = None) -> SamplingModel:
    """Loads a trained model, called as its stage or by a name, on the best available device."""
    with model.local_copy() as folder:
        return load_model(name or model.stage, folder, device=best_device())


class VariantsConfig(MeasureConfig):
    """Number of sampled images for each way to sample, with the settings of distances."""

    samples: int = Field(1000, ge=2)  # of each way; and at most so many held-out images to compare with

    @field_validator("feature_network")
    @classmethod
    def _distances_are_the_point(cls, network: FeatureNetwork) -> FeatureNetwork:
        if network == "none":
            raise ValueError("a study of distances needs a feature network")
        return network


class Made(NamedTuple):
    """Images of a job, with the network evaluations and the judged classes."""

    images: np.ndarray  # (N, H, W, 3) uint8
    evaluations: float  # of the sampled network, for each image
    correct: np.ndarray  # (N,) bool: True where an independent classifier sees the requested class; or (0,)


class Point(NamedTuple):
    """Measured distance, evaluations, accuracy and first images of a way to sample."""

    setting: Any  # the way, with a name and a title
    distance: float
    evaluations: float  # of the sampled network, for each image
    correct: np.ndarray  # as in `Made`
    first: list[np.ndarray]  # SHOWN images (H, W, 3) uint8

    @property
    def accuracy(self) -> float:
        """Share of images with the requested class."""
        return float(self.correct.mean())

    @property
    def accuracy_standard_error(self) -> float:
        """Standard error of the accuracy, as the share of a binomial sample."""
        return (self.accuracy * (1 - self.accuracy) / len(self.correct)) ** 0.5


class Measured(NamedTuple):
    """All points, with the distance and the accuracy of held-out images."""

    points: dict[str, Point]  # by the name of their setting
    held_out_distance: float
    held_out_accuracy: float = math.nan  # of an independent classifier, where there is one


class VariantFacts(NamedTuple):
    """Jobs of each way by name, the side of the images, and the judge's accuracy on held-out images."""

    jobs: dict[str, list[SampleJob]]
    resolution: int
    held_out_accuracy: float


V = TypeVar("V", bound=VariantsConfig)


class VariantStudy(ModelStudy[V]):
    """Images of one model made in several ways from the same requests, and the distance of each way."""

    by_prompt: ClassVar[bool]  # whether requests have captions too

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Name -> way to sample, with a name and a title; each once."""

    @abstractmethod
    def load(self) -> Any:
        """The models, with a `base`. Raises ValueError, of one line, for models that do not fit."""

    @abstractmethod
    def sample(self, models: Any, job: SampleJob) -> Made:
        """Images of a job in the way `job.variant`, in a single batch."""

    def held_out_accuracy(self, models: Any, resolution: int) -> float:
        """Accuracy of an independent classifier on held-out images; NaN without one."""
        return math.nan

    @abstractmethod
    def described(self, measured: Measured) -> Findings:
        """Plots, tables and figures of the points."""

    def plan(self) -> StudyPlan:
        """The same requests in every way, with labels, or labels and captions, of training images."""
        models, config = self.load(), self.config
        trained = read_random_part(self.index, View(SMALL), samples=config.reference_samples, seed=config.seed)
        captions = trained.caption if self.by_prompt else [""] * len(trained.label)
        asked: dict[str, Any] = {"labels": trained.label, "captions": captions, "count": config.samples}
        cascade = models if isinstance(models, Cascade) else Cascade(base=models.base)
        requests = measured_requests(cascade, "diffusion", **asked, seed=config.seed)
        jobs = variant_jobs(self.settings(), requests)
        size = models.base.settings["resolution"]
        facts = VariantFacts(jobs, size, self.held_out_accuracy(models, size))
        return StudyPlan([job for group in jobs.values() for job in group], facts)

    def worker(self) -> Callable[[Any], Any]:
        """Pool worker that samples a job in its way."""
        return ArrayWorker(self.load, self.sample, self.files)

    def sets(self, plan: StudyPlan) -> dict[str, ImageSet]:
        """Training images, held-out images, and the images of each way."""
        facts: VariantFacts = plan.facts
        held_out = held_out_parts(self.index, resolution=facts.resolution, limit=self.config.samples)
        sets = self.made_sets(facts.jobs, "images", resolution=facts.resolution)
        return sets | {HELD_OUT: ImageSet(tuple(held_out), "scale")}

    def findings(self, plan: StudyPlan, measured: dict[str, float]) -> Findings:
        """Findings of the points, read from the files of the jobs."""
        facts: VariantFacts = plan.facts
        points = read_points(self.files, facts.jobs, measured)
        return self.described(Measured(points, measured[HELD_OUT], facts.held_out_accuracy))


def variant_jobs(variants: Mapping[str, Any], requests: Sequence[Request]) -> dict[str, list[SampleJob]]:
    """Jobs for each way by name, called name-000, name-001, …"""
    return {name: [job._replace(variant=way) for job in jobs_of(name, requests)] for name, way in variants.items()}


@contextmanager
def counted(module: nn.Module) -> Iterator[list[int]]:
    """Batch size of each evaluation of a network, as long as the context lasts."""
    sizes: list[int] = []

    def count(_: nn.Module, inputs: Any, output: Any) -> None:
        """Appends the batch size of an evaluation."""
        sizes.append(len(output))

    hook = module.register_forward_hook(count)
    try:
        yield sizes
    finally:
        hook.remove()


def read_points(
    files: Store, jobs: Mapping[str, Sequence[SampleJob]], distances: Mapping[str, float]
) -> dict[str, Point]:
    """Images, evaluations and distance of each way, by name, from the files of the jobs."""
    points = {}
    for name, group in jobs.items():
        arrays = [read_arrays(files, job.name) for job in group]
        correct = np.concatenate([each["correct"] for each in arrays])
        mean = float(np.mean([float(each["evaluations"]) for each in arrays]))
        points[name] = Point(group[0].variant, distances[name], mean, correct, list(arrays[0]["images"][:SHOWN]))
    return points


def variants_grid(points: Mapping[str, Point]) -> bytes:
    """The first images of each way in a row, with equal seed and condition in a column. PNG."""
    return render_blocks([GridBlock(point.setting.title, point.first) for point in points.values()], columns=SHOWN)
