"""Images of one trained model made in several ways, each way from the same seeds and conditions, in resumable jobs.

Shapes: N images, H W their pixels.
"""

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from pydantic import Field, field_validator
from torch import nn

from components.data.shards import ShardIndex
from components.data.subset import random_part
from components.evaluation.features import FeatureNetwork
from components.evaluation.generated import jobs_of
from components.evaluation.grids import Block, render_blocks
from components.evaluation.image_sets import FileImages, ImageSet, held_out_parts, split_parts
from components.evaluation.measure import REFERENCE, DistanceRow, MeasureConfig, measure_distances
from components.pool import Pool, file_name
from components.sampling.requests import Request
from components.storage.store import Store

HELD_OUT = "held-out images"
SHOWN = 8  # images of each way


class VariantsConfig(MeasureConfig):
    """What is sampled in each way."""

    samples: int = Field(1000, ge=2)  # of each way; and at most so many held-out images to compare with

    @field_validator("feature_network")
    @classmethod
    def _distances_are_the_point(cls, network: FeatureNetwork) -> FeatureNetwork:
        if network == "none":
            raise ValueError("a study of distances needs a feature network")
        return network


class VariantJob(NamedTuple):
    """Requests that one worker samples in one batch, in one way."""

    name: str  # of its file, without `.npz`
    variant: Any  # the way, as the worker understands it
    requests: tuple[Request, ...]


class Made(NamedTuple):
    """What was made in one way."""

    images: np.ndarray  # (N, H, W, 3) uint8
    evaluations: float  # of the sampled network, for each image
    correct: np.ndarray  # (N,) bool: whether an independent classifier sees the class that was asked for; or (0,)


class Figures(NamedTuple):
    """What is known of what was made in one way."""

    evaluations: float  # of the sampled network, for each image
    correct: np.ndarray  # as in `Made`
    first: list[np.ndarray]  # SHOWN images (H, W, 3) uint8


def variant_jobs(variants: Mapping[str, Any], requests: Sequence[Request]) -> dict[str, list[VariantJob]]:
    """Name of the way -> its jobs, called name-000, name-001, …"""
    return {
        name: [VariantJob(job.name, variant, job.requests) for job in jobs_of(name, requests)]
        for name, variant in variants.items()
    }


@contextmanager
def counted(module: nn.Module) -> Iterator[list[int]]:
    """Batch size of each evaluation of a network, as long as the context lasts."""
    sizes: list[int] = []

    def count(_: nn.Module, inputs: Any, output: Any) -> None:
        sizes.append(len(output))

    hook = module.register_forward_hook(count)
    try:
        yield sizes
    finally:
        hook.remove()


def write_made(files: Store, job: VariantJob, made: Made) -> None:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **made._asdict())
    files.write(file_name(job.name), buffer.getvalue())


def read_figures(files: Store, jobs: Sequence[VariantJob]) -> Figures:
    """What the jobs of one way left next to their images, and the first of these."""
    evaluations, correct, first = [], [], []
    for job in jobs:
        with np.load(io.BytesIO(files.read(file_name(job.name))), allow_pickle=False) as arrays:
            evaluations.append(float(arrays["evaluations"]))
            correct.append(arrays["correct"])
            first = first or list(arrays["images"][:SHOWN])
    return Figures(float(np.mean(evaluations)), np.concatenate(correct), first)


def read_all_figures(files: Store, jobs: Mapping[str, Sequence[VariantJob]]) -> dict[str, Figures]:
    """`read_figures` of every way by its name. Opens all files, so it runs in a worker."""
    return {name: read_figures(files, group) for name, group in jobs.items()}


def measure_made(
    jobs: Mapping[str, Sequence[VariantJob]],
    config: VariantsConfig,
    index: ShardIndex,
    *,
    resolution: int,
    files: Store,
    pool: Pool,
    progress: Callable[[int, int], None],
) -> list[DistanceRow]:
    """Distances to training images of what was made in each way, and of held-out images."""
    part = random_part(index, samples=config.reference_samples, seed=config.seed)
    trained = split_parts(part, "train", resolution=resolution, limit=config.reference_samples)
    held_out = held_out_parts(index, resolution=resolution, limit=config.samples)
    sets = {REFERENCE: ImageSet(tuple(trained), "scale"), HELD_OUT: ImageSet(tuple(held_out), "scale")}
    for name, group in jobs.items():
        parts = [FileImages(files, file_name(job.name), "images", len(job.requests)) for job in group]
        sets[name] = ImageSet(tuple(parts), "model")
    return measure_distances(sets, config, pool=pool, progress=progress)[0]


def variants_grid(made: Mapping[str, Figures]) -> bytes:
    """The first images of each way, in a row of their own: one column has one seed and one condition. PNG."""
    return render_blocks([Block(name, list(found.first)) for name, found in made.items()], columns=SHOWN)
