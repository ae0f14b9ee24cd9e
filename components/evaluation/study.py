"""A study of trained models: variants × requests → images → measures → rows → table, plot and figures.

A study is a class: what is sampled, in jobs that each leave a file; which images are measured; what is found. The stage
of all studies (`run_study` in `components/stages/evaluate.py`) runs it. The studies that sample one model in several
ways, from equal seeds and conditions, share `VariantStudy`.
Shapes: N images, H W their pixels.
"""

import io
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import numpy as np
from pydantic import Field, field_validator
from torch import nn

from components.configuration.config import Config, refuse
from components.data.held_out import SMALL, SplitArrays, random_part, read_split
from components.data.shards import ShardIndex, View
from components.evaluation.features import (
    FeatureNetwork,
    MeasureConfig,
    Measuring,
    distance_rows,
    measure_features,
    read_arrays,
)
from components.evaluation.generated import CascadeSampler, SampleJob, jobs_of, measured_requests
from components.evaluation.grids import GridBlock, render_blocks
from components.evaluation.image_sets import (
    HELD_OUT,
    REFERENCE,
    FileImages,
    ImagePart,
    ImageSet,
    split_parts,
    trained_parts,
)
from components.runtime.pool import Pool, file_name, write_job
from components.runtime.storage.artifact import Artifact
from components.runtime.storage.store import Store
from components.sampling.cascade import Cascade
from components.sampling.device import best_device
from components.sampling.model import SamplingModel, load_model

SHOWN = 8  # images of each way
C = TypeVar("C", bound=Config)


class Findings(NamedTuple):
    """All that a study leaves in the report."""

    plots: dict[str, str]  # title -> SVG
    tables: dict[str, dict[str, Any]]  # title -> columns and rows
    summary: dict[str, float]  # metric -> figure
    headline: dict[str, float]  # the few figures by which the study is known, in words -> figure
    images: dict[str, bytes]  # name -> PNG


class StudyPlan(NamedTuple):
    """The jobs of a study by the name of their set, and sets of images to measure distances of."""

    groups: Mapping[str, Sequence[Any]]
    sets: Mapping[str, ImageSet] = {}
    facts: Any = None  # for the study's own later steps

    @property
    def jobs(self) -> list[Any]:
        """All jobs in order."""
        return [*chain(*self.groups.values())]


@dataclass(frozen=True)
class ModelStudy(ABC, Generic[C]):
    """A study with its configuration and models. All methods but `measure` run in workers."""

    config: C
    index: ShardIndex
    models: Mapping[str, Artifact]
    files: Store  # of the jobs
    stage: str  # its name: makes ids of plots its own

    def plan(self) -> StudyPlan:
        """The jobs, where there are any. Raises ValueError of one line for models or images that do not fit."""
        return StudyPlan({})

    def worker(self) -> Callable[[Any], Any]:
        """Pool worker that does a job: samples requests of the cascade."""
        return CascadeSampler(self.models["cascade"], self.files)

    def images_of(self, job: Any) -> int:
        """Number of images of a job."""
        return len(job.requests)

    def measure(self, plan: StudyPlan, work: Measuring) -> Any:
        """Distance of the finished jobs' images by name of the set."""
        config = self.config
        if not isinstance(config, MeasureConfig) or config.feature_network == "none" or not plan.sets:
            return {}
        features = measure_features(plan.sets, config, work)
        return {row.name: row.distance for row in distance_rows(features, pool=work.pool, seed=config.seed)}

    @abstractmethod
    def findings(self, plan: StudyPlan, measured: Any) -> Findings:
        """Plots, tables and figures of the finished jobs and the measures."""

    def sets(self, groups: Mapping[str, Sequence[Any]], array: str, *, resolution: int) -> dict[str, ImageSet]:
        """Training images as the reference, and an array of the files of each group of jobs."""
        assert isinstance(self.config, MeasureConfig)
        count, seed = self.config.reference_samples, self.config.seed
        trained = trained_parts(self.index, samples=count, seed=seed, resolution=resolution)
        made = {name: ImageSet(tuple(self.images(group, array)), "model") for name, group in groups.items()}
        return {REFERENCE: ImageSet(tuple(trained), "scale"), **made}

    def images(self, jobs: Sequence[SampleJob], array: str = "image.") -> list[FileImages]:
        """An array of the files of jobs, by default the finished images."""
        return [FileImages(self.files, file_name(job.name), array, len(job.requests)) for job in jobs]

    def held_out(self, *, resolution: int, limit: int) -> SplitArrays:
        """The first held-out images. Raises ValueError for a set that holds none out."""
        split = read_split(self.index, "holdout", View(resolution), limit=limit)
        if not split.key:
            raise ValueError(f"{self.index.source} holds no image out; set images.holdout_fraction")
        return split


class AskedSet(NamedTuple):
    """Images and requests for a judge."""

    parts: Sequence[ImagePart]
    asked: Sequence[Any]  # (N,)


def judged(pool: Pool, judge: Callable[[], Any], sets: Mapping[str, AskedSet]) -> dict[str, np.ndarray]:
    """Answers (N, ...) of a judge about the images of each set.
    `judge`: makes the pool worker that takes a part."""
    answers = pool.map(judge, [part for images in sets.values() for part in images.parts])
    return {name: np.concatenate([next(answers) for _ in images.parts]) for name, images in sets.items()}


class ArrayWorker:
    """Pool worker with the models from `load`; the arrays that `make` makes of a job are the job's file."""

    def __init__(self, load: Callable[[], Any], make: Callable[[Any, Any], Mapping[str, Any]], files: Store) -> None:
        self.models, self.make, self.files = load(), make, files

    def __call__(self, job: Any) -> None:
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **self.make(self.models, job))
        write_job(self.files, job.name, buffer.getvalue())


def load_trained(model: Artifact, name: str | None = None) -> SamplingModel:
    """Loads a trained model, called as its stage or by a name, on the best available device."""
    with model.local_copy() as folder:
        return load_model(name or model.stage, folder, device=best_device())


class VariantsConfig(MeasureConfig):
    """Number of sampled images for each way to sample, with the settings of distances."""

    samples: int = Field(1000, ge=2)  # of each way; of held-out images at most

    @field_validator("feature_network")
    @classmethod
    def _distances_are_the_point(cls, network: FeatureNetwork) -> FeatureNetwork:
        refuse(network == "none", "a study of distances needs a feature network")
        return network


class Point(NamedTuple):
    """Measured distance, evaluations, judged classes and first images of a way to sample."""

    setting: Any  # the way, with a name and a title
    distance: float
    evaluations: float  # of the sampled network, for each image
    correct: np.ndarray  # (N,) bool: the classifier sees the requested class; or (0,)
    first: list[np.ndarray]  # SHOWN images (H, W, 3) uint8

    @property
    def accuracy(self) -> float:
        """Share of images with the requested class."""
        return float(self.correct.mean())


class Measured(NamedTuple):
    """All points, with the distance and the accuracy of held-out images."""

    points: dict[str, Point]  # by the name of their setting
    held_out_distance: Mapping[str, float]  # by the set's name; {} for fewer than two images, which have none
    held_out_accuracy: float  # of an independent classifier; NaN without classifier or held-out images


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
    def sample(self, models: Any, job: SampleJob) -> dict[str, Any]:
        """Arrays `images`, `evaluations` and `correct` of a job in the way `job.variant`, see `Point`."""

    def side(self, models: Any) -> int:
        """Pixels of a side of the images."""
        return models.base.settings["resolution"]

    def held_out_accuracy(self, models: Any, resolution: int) -> float:
        """Accuracy of an independent classifier on held-out images; NaN without either."""
        return math.nan

    @abstractmethod
    def described(self, measured: Measured) -> Findings:
        """Plots, tables and figures of the points."""

    def plan(self) -> StudyPlan:
        """The same requests in every way, with labels, or labels and captions, of training images."""
        models, config = self.load(), self.config
        part = random_part(self.index, samples=config.reference_samples, seed=config.seed)
        trained = read_split(part, "train", View(SMALL), limit=config.reference_samples)
        captions = trained.caption if self.by_prompt else [""] * len(trained.label)
        asked: dict[str, Any] = {"labels": trained.label, "captions": captions, "count": config.samples}
        cascade = models if isinstance(models, Cascade) else Cascade(base=models.base)
        requests = measured_requests(cascade, "diffusion", **asked, seed=config.seed)
        groups = {}
        for name, way in self.settings().items():
            groups[name] = [job._replace(variant=way) for job in jobs_of(name, requests)]
        side = self.side(models)
        held_out = split_parts(self.index, "holdout", resolution=side, limit=config.samples)  # of none: no such set
        sets = self.sets(groups, "images", resolution=side) | {HELD_OUT: ImageSet(tuple(held_out), "scale")}
        return StudyPlan(groups, sets, self.held_out_accuracy(models, side))

    def worker(self) -> Callable[[Any], Any]:
        """Pool worker that samples a job in its way."""
        return ArrayWorker(self.load, self.sample, self.files)

    def findings(self, plan: StudyPlan, measured: dict[str, float]) -> Findings:
        """Findings of the points, read from the files of the jobs."""
        points = read_points(self.files, plan.groups, measured)
        held_out = {name: distance for name, distance in measured.items() if name == HELD_OUT}
        return self.described(Measured(points, held_out, plan.facts))


@contextmanager
def counted(module: nn.Module) -> Iterator[list[int]]:
    """Batch size of each evaluation of a network, as long as the context lasts."""
    sizes: list[int] = []

    def count(module: nn.Module, inputs: Any, output: Any) -> None:
        sizes.append(len(output))

    with module.register_forward_hook(count):
        yield sizes


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
    blocks = [GridBlock(point.setting.title, point.first) for point in points.values()]
    return render_blocks(blocks, columns=SHOWN)
