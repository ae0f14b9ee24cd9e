"""Images of a trained model, sampled in several ways from equal seeds and conditions.

Each way is sampled in resumable jobs.

Shapes: N images, H W their pixels.
"""

import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from pydantic import Field, field_validator
from torch import nn

from components.data.held_out import random_part, read_random_part
from components.data.shards import ShardIndex
from components.evaluation.features import FeatureNetwork
from components.evaluation.generated import jobs_of, measured_requests
from components.evaluation.grids import GridBlock, render_blocks
from components.evaluation.image_sets import HELD_OUT, REFERENCE, FileImages, ImageSet, held_out_parts, split_parts
from components.evaluation.measure import MeasureConfig
from components.runtime.pool import file_name, write_job
from components.runtime.storage.store import Store
from components.sampling.cascade import Cascade
from components.sampling.requests import Request

SHOWN = 8  # images of each way
SMALL = 8  # pixels: only labels and captions are wanted


class VariantsConfig(MeasureConfig):
    """Number of sampled images for each way to sample, with the settings of distances."""

    samples: int = Field(1000, ge=2)  # of each way; and at most so many held-out images to compare with

    @field_validator("feature_network")
    @classmethod
    def _distances_are_the_point(cls, network: FeatureNetwork) -> FeatureNetwork:
        if network == "none":
            raise ValueError("a study of distances needs a feature network")
        return network


class VariantJob(NamedTuple):
    """Requests for a single worker to sample in a single batch and way."""

    name: str  # of its file, without `.npz`
    variant: Any  # the way, as the worker understands it
    requests: tuple[Request, ...]


class Made(NamedTuple):
    """Images of a job, with the network evaluations and the judged classes."""

    images: np.ndarray  # (N, H, W, 3) uint8
    evaluations: float  # of the sampled network, for each image
    correct: np.ndarray  # (N,) bool: True where an independent classifier sees the requested class; or (0,)


class StudyPlan(NamedTuple):
    """Starting point of a study: requests, and the accuracy on held-out images."""

    requests: list[Request]
    resolution: int
    held_out_accuracy: float = math.nan  # of an independent classifier, where there is one


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
    """Results of a study by setting, with the distance and the accuracy of held-out images."""

    points: dict[str, Point]  # by the name of their setting
    held_out_distance: float
    held_out_accuracy: float


def variant_jobs(variants: Mapping[str, Any], requests: Sequence[Request]) -> dict[str, list[VariantJob]]:
    """Jobs for each way by name, called name-000, name-001, …"""
    return {
        name: [VariantJob(job.name, variant, job.requests) for job in jobs_of(name, requests)]
        for name, variant in variants.items()
    }


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


class VariantSampler:
    """Actor of the pool with the models from `load`, sampled in any way."""

    def __init__(self, load: Callable[[], Any], sample: Callable[[Any, VariantJob], Made], files: Store) -> None:
        self.models, self.sample, self.files = load(), sample, files

    def __call__(self, job: VariantJob) -> VariantJob:
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **self.sample(self.models, job)._asdict())
        write_job(self.files, job.name, buffer.getvalue())
        return job


def study_requests(config: VariantsConfig, index: ShardIndex, cascade: Cascade, *, prompts: bool) -> list[Request]:
    """Requests with labels of training images, and with captions where prompts are wanted."""
    trained = read_random_part(index, samples=config.reference_samples, seed=config.seed, resolution=SMALL)
    captions = trained.caption if prompts else [""] * len(trained.label)
    asked: dict[str, Any] = {"labels": trained.label, "captions": captions, "count": config.samples}
    return measured_requests(cascade, "diffusion", **asked, seed=config.seed)


def read_points(
    files: Store, jobs: Mapping[str, Sequence[VariantJob]], distances: Mapping[str, float]
) -> dict[str, Point]:
    """Images, evaluations and distance of each way, by name.

    Reads all files of the jobs, so the function runs in a worker.
    """
    points = {}
    for name, group in jobs.items():
        evaluations, correct, first = [], [], []
        for job in group:
            with np.load(io.BytesIO(files.read(file_name(job.name))), allow_pickle=False) as arrays:
                evaluations.append(float(arrays["evaluations"]))
                correct.append(arrays["correct"])
                first = first or list(arrays["images"][:SHOWN])
        mean = float(np.mean(evaluations))
        points[name] = Point(group[0].variant, distances[name], mean, np.concatenate(correct), first)
    return points


def sets_of(
    jobs: Mapping[str, Sequence[VariantJob]],
    config: VariantsConfig,
    index: ShardIndex,
    files: Store,
    *,
    resolution: int,
) -> dict[str, ImageSet]:
    """Training images, held-out images, and the images of each way in `files`."""
    part = random_part(index, samples=config.reference_samples, seed=config.seed)
    trained = split_parts(part, "train", resolution=resolution, limit=config.reference_samples)
    held_out = held_out_parts(index, resolution=resolution, limit=config.samples)
    sets = {REFERENCE: ImageSet(tuple(trained), "scale"), HELD_OUT: ImageSet(tuple(held_out), "scale")}
    for name, group in jobs.items():
        parts = [FileImages(files, file_name(job.name), "images", len(job.requests)) for job in group]
        sets[name] = ImageSet(tuple(parts), "model")
    return sets


def variants_grid(points: Mapping[str, Point]) -> bytes:
    """The first images of each way in a row, with equal seed and condition in a column. PNG."""
    return render_blocks([GridBlock(point.setting.title, point.first) for point in points.values()], columns=SHOWN)
