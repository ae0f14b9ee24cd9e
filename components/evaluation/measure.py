"""Fréchet distances of many sets of images to a common reference, with precision and recall.

Shapes: N images of a set, D features.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
from pydantic import Field

from components.configuration.config import Config
from components.evaluation.distance import (
    Gaussian,
    distance_error,
    distance_of_halves,
    frechet_distance,
    gaussian_of,
    pack_gaussian,
)
from components.evaluation.feature_files import FeatureSet, measure_features, read_features
from components.evaluation.features import FeatureNetwork, FeaturePrecision
from components.evaluation.image_sets import REFERENCE, ImageSet, Purpose
from components.evaluation.precision_recall import NEIGHBORS, precision_recall
from components.runtime.pool import Pool
from components.runtime.storage.store import Store


class MeasureConfig(Config):
    """Feature network, precision and image counts of Fréchet distances."""

    feature_network: FeatureNetwork = "efficientnet_lite0"
    precision: FeaturePrecision = "fp32"  # bf16: where the device has it; changes distances by less than 1 %
    reference_samples: int = Field(10_000, ge=2)  # at most so many training images
    seed: int = Field(0, ge=0)


class DistanceRow(Config):
    """Measured Fréchet distance of a set, with precision and recall on the same features."""

    name: str
    distance: float
    samples: int  # N
    purpose: Purpose
    standard_error: float | None = None  # of the distance, over images (`distance_error`)
    precision: float | None = None  # of N images and as many of the reference, or of all those that there are
    recall: float | None = None

    def metrics(self, network: str) -> dict[str, float]:
        """Measured figures by metric name: letters, digits and underscores only."""
        name = re.sub(r"[^a-z0-9]+", "_", self.name.lower().replace("²", "")).strip("_")
        found = {"fd": self.distance, "precision": self.precision, "recall": self.recall}
        return {f"{figure}_{network}_{name}": value for figure, value in found.items() if value is not None}


def measure_distances(
    sets: Mapping[str, ImageSet],
    config: MeasureConfig,
    *,
    work: Store,
    pool: Pool,
    progress: Callable[[int, int], None],
) -> list[DistanceRow]:
    """Distance of each set to the set called REFERENCE, and the distance between halves.

    The halves are those of the reference. Other arguments are as in `measure_features`.
    """
    precision = config.precision
    measured = measure_features(
        sets, network=config.feature_network, precision=precision, work=work, pool=pool, progress=progress
    )
    return distance_rows(measured, work, pool=pool, seed=config.seed)


def distance_rows(
    sets: Sequence[FeatureSet], work: Store, *, pool: Pool, seed: int, refined: bool = False, reference: str = REFERENCE
) -> list[DistanceRow]:
    """Rows of distances from the files of features, shared among the workers.

    Rows are those of `measure_distances`; the workers take the sets in turn.

    Args:
        refined: with errors, precision and recall, which take most of the time.
        reference: name of the set that the others are measured to.
    """
    (to,) = (images for images in sets if images.name == reference)
    ordered = [to, *(images for images in sets if images is not to)]
    return list(pool.map(partial(RowMeasurer, work, to, seed=seed, refined=refined), ordered))


class RowMeasurer:
    """Pool worker that measures sets, with the reference features in memory.

    One other set is in memory beside the reference.
    """

    def __init__(self, work: Store, to: FeatureSet, *, seed: int, refined: bool) -> None:
        self.work, self.to, self.seed, self.refined = work, to, seed, refined
        self.references = read_features(work, to.files)
        self.reference = gaussian_of(self.references)

    def __call__(self, images: FeatureSet) -> DistanceRow:
        if images == self.to:
            return halves_row(self.references, name=self.to.name, seed=self.seed)
        vectors = read_features(self.work, images.files)
        row = distance_row(images.name, vectors, self.reference, images.purpose)
        if not self.refined:
            return row
        return refined_row(row, vectors, references=self.references, reference=self.reference, seed=self.seed)


def halves_row(references: np.ndarray, *, name: str, seed: int) -> DistanceRow:
    """Distance between two halves of the reference, with features (R, D), as a row of the given name."""
    distance, count = distance_of_halves(references, seed=seed), len(references) // 2
    return DistanceRow(name=f"two halves of the {name}", distance=distance, samples=count, purpose="scale")


def distance_row(name: str, vectors: np.ndarray, reference: Gaussian, purpose: Purpose) -> DistanceRow:
    """Distance of a set with features (N, D) to the reference, as a row."""
    distance = frechet_distance(gaussian_of(vectors), reference)
    return DistanceRow(name=name, distance=distance, samples=len(vectors), purpose=purpose)


def packed_reference(work: Store, files: Sequence[str]) -> bytes:
    """Packed Gaussian of a set, from the files of features. Runs in a worker."""
    return pack_gaussian(gaussian_of(read_features(work, files)))


def refined_row(
    row: DistanceRow, vectors: np.ndarray, references: np.ndarray, reference: Gaussian, *, seed: int
) -> DistanceRow:
    """The row with the standard error of the distance, and precision and recall.

    Features are (N, D); precision and recall need images enough. `reference` is of the features `references` (R, D).
    """
    found: dict[str, float | None] = {"standard_error": distance_error(vectors, reference, seed=seed)}
    count = min(len(vectors), len(references))
    if count > NEIGHBORS:
        drawn = np.random.default_rng(seed)
        real, made = (each[drawn.permutation(len(each))[:count]] for each in (references, vectors))
        found |= precision_recall(real, made)._asdict()
    return row.replace(**found)
