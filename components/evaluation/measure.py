"""Fréchet distances of many sets of images to one reference, measured in parallel; precision and recall.

Shapes: N images of a set, D features.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from pydantic import Field

from components.configuration.config import Config
from components.evaluation.distance import (
    Gaussian,
    distance_error,
    distance_of_halves,
    frechet_distance,
    gaussian_of,
)
from components.evaluation.features import FeatureExtractor, FeatureNetwork, FeaturePrecision
from components.evaluation.image_sets import (
    ImagePart,
    ImageSet,
    Purpose,
    ShardImages,
    ShrunkImages,
    noise_parts,
    spread,
)
from components.evaluation.precision_recall import NEIGHBORS, precision_recall
from components.pool import Pool

REFERENCE = "training images"


class MeasureConfig(Config):
    """By what distances are measured, and to how many images."""

    feature_network: FeatureNetwork = "efficientnet_lite0"
    precision: FeaturePrecision = "fp32"  # bf16: where the device has it; changes distances by less than 1 %
    reference_samples: int = Field(10_000, ge=2)  # at most so many training images
    seed: int = Field(0, ge=0)


class DistanceRow(Config):
    """One measured distance; and of the same images, in the same features, precision and recall."""

    name: str
    distance: float
    samples: int  # N
    purpose: Purpose
    standard_error: float | None = None  # of the distance, over images (`distance_error`)
    precision: float | None = None  # of N images and as many of the reference, or of all those that there are
    recall: float | None = None

    def metrics(self, network: str) -> dict[str, float]:
        """What was measured by its name among metrics: letters, digits and underscores only."""
        name = re.sub(r"[^a-z0-9]+", "_", self.name.lower().replace("²", "")).strip("_")
        found = {"fd": self.distance, "precision": self.precision, "recall": self.recall}
        return {f"{figure}_{network}_{name}": value for figure, value in found.items() if value is not None}


class PartMeasurer:
    """One worker of the pool: the features of a part's images."""

    def __init__(self, network: FeatureNetwork, precision: FeaturePrecision) -> None:
        self.features = FeatureExtractor(network, precision=precision)

    def __call__(self, part: ImagePart) -> np.ndarray:  # (N, D) float32
        return np.concatenate([self.features(images) for images in part.batches()])


def measure_features(
    sets: Mapping[str, ImageSet], config: MeasureConfig, *, pool: Pool, progress: Callable[[int, int], None]
) -> dict[str, np.ndarray]:
    """Features (N, D) float32 of each set of at least two images. `progress` is called with images done and their
    total."""
    parts = [(name, part) for name, images in sets.items() if images.num_images > 1 for part in images.parts]
    total, done = sum(part.num_images for _, part in parts), 0
    found: dict[str, list[np.ndarray]] = {}
    make_worker = partial(PartMeasurer, config.feature_network, config.precision)
    for (name, part), features in zip(parts, pool.map(make_worker, [part for _, part in parts]), strict=True):
        found.setdefault(name, []).append(features)
        progress(done := done + part.num_images, total)
    return {name: np.concatenate(features) for name, features in found.items()}


def measure_distances(
    sets: Mapping[str, ImageSet], config: MeasureConfig, *, pool: Pool, progress: Callable[[int, int], None]
) -> tuple[list[DistanceRow], Gaussian]:
    """The distance of each set to the one called REFERENCE, and between its halves; with the reference itself."""
    features = measure_features(sets, config, pool=pool, progress=progress)
    return distance_rows(features, {name: images.purpose for name, images in sets.items()}, seed=config.seed)


def distance_rows(
    features: Mapping[str, np.ndarray], purposes: Mapping[str, Purpose], *, seed: int
) -> tuple[list[DistanceRow], Gaussian]:
    """As `measure_distances`, from features (N, D) of each set."""
    reference = gaussian_of(features[REFERENCE])
    halves = distance_of_halves(features[REFERENCE], seed=seed)
    rows = [
        DistanceRow(
            name=f"two halves of the {REFERENCE}", distance=halves, samples=reference.count // 2, purpose="scale"
        )
    ]
    for name, vectors in features.items():
        if name != REFERENCE:
            distance = frechet_distance(gaussian_of(vectors), reference)
            rows.append(DistanceRow(name=name, distance=distance, samples=len(vectors), purpose=purposes[name]))
    return rows, reference


def refined_row(
    row: DistanceRow, vectors: np.ndarray, references: np.ndarray, reference: Gaussian, *, seed: int
) -> DistanceRow:
    """The row of a set with features (N, D), with the error of its distance, and precision and recall where there are
    images enough. `reference` is of the features `references` (R, D)."""
    found: dict[str, float | None] = {"standard_error": distance_error(vectors, reference, seed=seed)}
    count = min(len(vectors), len(references))
    if count > NEIGHBORS:
        drawn = np.random.default_rng(seed)
        real, made = (each[drawn.permutation(len(each))[:count]] for each in (references, vectors))
        found |= precision_recall(real, made)._asdict()
    return row.replace(**found)


class MadeStage(NamedTuple):
    """What one stage of a generator made."""

    generator: str
    stage: str
    side: int  # H = W
    parts: tuple[ImagePart, ...]


def branch_name(generator: str) -> str:
    """What the images of a generator are called in tables."""
    return f"{generator.removesuffix('s')} branch"


def compared_sets(
    trained: Sequence[ShardImages], held_out: Sequence[ShardImages], made: Sequence[MadeStage], *, seed: int
) -> dict[str, ImageSet]:
    """What is measured against the training images: all that was made, and what tells how to read the numbers.

    Each stage is measured at its own size, so the base's images at, say, 16² are next to training images of 16².
    """
    side = trained[0].resolution
    sets = {REFERENCE: ImageSet(tuple(trained), "scale"), "held-out images": ImageSet(tuple(held_out), "scale")}
    counts = [ImageSet(stage.parts, "model").num_images for stage in made]
    count = max(counts, default=sets["held-out images"].num_images)
    for small in sorted({stage.side for stage in made if stage.side < side}):
        parts = tuple(ShrunkImages(part, small) for part in spread(trained, count, seed=seed))
        sets[f"{REFERENCE} shrunk to {small}²"] = ImageSet(parts, "scale")
    sets["noise"] = ImageSet(tuple(noise_parts(count, resolution=side, seed=seed)), "scale")
    for stage in made:
        about = "" if stage.stage == "model" else f": {stage.stage.replace('_', ' ')}"
        name = f"{branch_name(stage.generator)}{about}, {stage.side}²"
        sets[name] = ImageSet(stage.parts, "model")
    return sets
