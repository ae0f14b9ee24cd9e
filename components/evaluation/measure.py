"""Figures of many sets of images against a common reference, from features of all sets.

Shapes: N images of a set, D features.
"""

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Annotated, Any

from pydantic import AfterValidator, ConfigDict, Field

from components.configuration.config import Config, Since
from components.configuration.usage import nearest
from components.evaluation.features import FeatureNetwork, FeaturePrecision, FeatureSet, measure_features
from components.evaluation.image_sets import REFERENCE, ImageSet, Purpose
from components.evaluation.metrics import (
    METRICS,
    Compared,
    distance_error,
    distance_of_halves,
    gaussian_of,
    pack_gaussian,
)
from components.runtime.pool import Pool


def known_metrics(names: tuple[str, ...]) -> tuple[str, ...]:
    """Names of METRICS, unchanged. Raises ValueError for another."""
    for name in names:
        if name not in METRICS:
            raise ValueError(f"no metric {name!r}{nearest(name, METRICS)}")
    return names


# Names of figures of a recipe. A new one moves the key of its stage, and so is measured of finished runs too.
MetricNames = Annotated[
    tuple[str, ...], AfterValidator(known_metrics), Since(("distance", "precision", "recall")), Field(min_length=1)
]


class MeasureConfig(Config):
    """Feature network, precision and image counts of Fréchet distances."""

    feature_network: FeatureNetwork = "efficientnet_lite0"
    precision: FeaturePrecision = "fp32"  # bf16: where the device has it; changes distances by less than 1 %
    reference_samples: int = Field(10_000, ge=2)  # at most so many training images
    seed: int = Field(0, ge=0)


class DistanceRow(Config):
    """Measured figures of a set: the Fréchet distance, and any other of METRICS by its name."""

    model_config = ConfigDict(extra="allow")

    name: str
    distance: float
    samples: int  # N
    purpose: Purpose
    standard_error: float | None = None  # of the distance, over images (`distance_error`)

    def figure(self, metric: str) -> float | None:
        """Value of a metric; None if it was not measured."""
        return getattr(self, metric, None)

    def error(self, metric: str) -> float | None:
        """Standard error of a metric over images; of a share, that of so many independent images."""
        if metric == "distance":
            return self.standard_error
        share = self.figure(metric) if METRICS[metric].share else None
        return None if share is None else (share * (1 - share) / self.samples) ** 0.5

    def metrics(self, network: str) -> dict[str, float]:
        """Measured figures by name in MLflow: letters, digits and underscores only."""
        name = re.sub(r"[^a-z0-9]+", "_", self.name.lower().replace("²", "")).strip("_")
        values = {metric.prefix or key: self.figure(key) for key, metric in METRICS.items()}
        return {f"{figure}_{network}_{name}": value for figure, value in values.items() if value is not None}


def measure_distances(
    sets: Mapping[str, ImageSet], config: MeasureConfig, *, pool: Pool, **work: Any
) -> list[DistanceRow]:
    """Distance of each set to REFERENCE, and between its halves; `work` as in `measure_features`."""
    features = measure_features(sets, network=config.feature_network, precision=config.precision, pool=pool, **work)
    return distance_rows(features, pool=pool, seed=config.seed)


def distance_rows(
    sets: Sequence[FeatureSet], *, pool: Pool, seed: int, metrics: Sequence[str] = (), reference: str = REFERENCE
) -> list[DistanceRow]:
    """Rows of figures from the files of features; the workers take the sets in turn.

    The first row is the distance between two halves of the reference.

    Args:
        metrics: figures beside the distance; the distance's standard error if they name it.
        reference: name of the set that the others are measured to.
    """
    (to,) = (images for images in sets if images.name == reference)
    ordered = [to, *(images for images in sets if images is not to)]
    return list(pool.map(partial(RowMeasurer, to, seed=seed, metrics=tuple(metrics)), ordered))


class RowMeasurer:
    """Pool worker that measures sets, with the features of the reference and of a single set in memory."""

    def __init__(self, to: FeatureSet, *, seed: int, metrics: tuple[str, ...]) -> None:
        self.to, self.seed, self.metrics, self.references = to, seed, metrics, to.read()
        self.reference = gaussian_of(self.references)

    def __call__(self, images: FeatureSet) -> DistanceRow:
        if images == self.to:
            distance, count = distance_of_halves(self.references, seed=self.seed), len(self.references) // 2
            name = f"two halves of the {images.name}"
            empty = dict.fromkeys(metric for metric in self.metrics if metric != "distance")
            return DistanceRow(name=name, distance=distance, samples=count, purpose="scale", **empty)
        compared = Compared(images.read(), self.references, self.reference, seed=self.seed)
        return measured_row(images.name, images.purpose, compared, self.metrics)


def measured_row(name: str, purpose: Purpose, compared: Compared, metrics: Sequence[str] = ()) -> DistanceRow:
    """The figures of a set; None for those that need more images."""
    count = min(len(compared.features), len(compared.references))
    chosen = {metric: METRICS[metric] for metric in ("distance", *metrics)}
    figures = {n: metric.measure(compared) if count >= metric.images else None for n, metric in chosen.items()}
    if "distance" in metrics:
        figures["standard_error"] = distance_error(compared.features, compared.reference, seed=compared.seed)
    return DistanceRow.model_validate(figures | {"name": name, "samples": len(compared.features), "purpose": purpose})


def packed_reference(images: FeatureSet) -> bytes:
    """Packed Gaussian of a set, from the files of features. Runs in a worker."""
    return pack_gaussian(gaussian_of(images.read()))
