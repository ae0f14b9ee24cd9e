"""Features of images from a named pretrained network, kept beside the images, and figures over them.

Features are measured part by part over all workers; each part leaves a file in the folder `features` next to its
images, named by its content, the network and the protocol. So no part is measured twice: not by a stage that was
killed, not for another figure, not for another recipe on the same images. No process holds a set's images, and the
head not even the features of a set.

Shapes: N images, H W their pixels, D features of the network.
"""

import hashlib
import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Annotated, Any, NamedTuple

import numpy as np
from pydantic import AfterValidator, ConfigDict, Field

from components.configuration.config import Config, Since, refuse
from components.configuration.usage import nearest
from components.data.shards import ShardIndex
from components.evaluation.image_sets import REFERENCE, ImagePart, ImageSet, Purpose
from components.evaluation.metrics import (
    METRICS,
    Compared,
    Gaussian,
    distance_error,
    distance_of_halves,
    gaussian_of,
    pack_gaussian,
    published_name,
    share_error,
)
from components.evaluation.networks import (
    FEATURES,
    FeatureExtractor,
    FeatureNetwork,
    FeaturePrecision,
    check_feature_network,
    lacking_weights,
)
from components.runtime.pool import Later, Pool, file_name, write_job
from components.runtime.storage.artifact import record_path
from components.runtime.storage.store import Store, in_parallel

PROTOCOL = 1  # raised with every change that moves features
LOGITS = "logits"  # array of the files, of a classifier alone


def known_metrics(names: tuple[str, ...]) -> tuple[str, ...]:
    """Names of METRICS, unchanged. Raises ValueError for another."""
    for name in names:
        if name not in METRICS:
            raise ValueError(f"no metric {name!r}{nearest(name, METRICS)}")
    return names


# Names of figures of a recipe. A new one of USUAL moves the key of its stage, and so is measured of finished runs too.
MetricNames = Annotated[
    tuple[str, ...], AfterValidator(known_metrics), Since(("distance", "precision", "recall")), Field(min_length=1)
]


class MeasureConfig(Config):
    """Feature network, precision and image counts of Fréchet distances."""

    feature_network: FeatureNetwork = "efficientnet_lite0"
    feature_weights: Annotated[str | None, Since(None)] = None  # URI of the file, for networks that no package ships
    precision: FeaturePrecision = "fp32"  # bf16: where the device has it; changes distances by less than 1 %
    reference_samples: int = Field(10_000, ge=2)  # at most so many training images
    seed: int = Field(0, ge=0)

    def _check(self) -> None:
        super()._check()
        fault = lacking_weights(self.feature_network, self.feature_weights)
        refuse(fault, fault)
        rounded = self.feature_weights is not None and self.precision == "bf16"
        refuse(rounded, f"feature_network {self.feature_network} is measured in fp32, as published; precision: fp32")

    def facts(self) -> tuple[str, ...]:
        """All that decides features of given images; reads the weights. Raises FeatureNetworkError."""
        weights = check_feature_network(self.feature_network, self.feature_weights)
        return (self.feature_network, self.precision, *([weights] if weights else []))


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
        return None if share is None else share_error(share, self.samples)

    def metrics(self, network: str) -> dict[str, float]:
        """Measured figures by name in MLflow: letters, digits and underscores only."""
        name = re.sub(r"[^a-z0-9]+", "_", self.name.lower().replace("²", "")).strip("_")
        return {f"{figure}_{name}": value for figure, value in self.published(network).items()}

    def published(self, network: str) -> dict[str, float]:
        """Measured figures by names with network and protocol: `fid_inception_50k`."""
        values = {published_name(key, network, self.samples): self.figure(key) for key in METRICS}
        return {name: value for name, value in values.items() if value is not None}


class FeatureJob(NamedTuple):
    """A part of a set, measured by a single worker, with the file of the features."""

    name: str  # of the file, without `.npz`
    part: ImagePart
    folder: Store  # next to the images


class FeatureSet(NamedTuple):
    """A set of images as files of features, in the order of the parts."""

    name: str
    purpose: Purpose
    files: tuple[FeatureJob, ...]

    def read(self) -> np.ndarray:
        """The features (N, D) float32 of the set, part by part in order."""
        return np.concatenate([read_arrays(job.folder, job.name)[FEATURES] for job in self.files])

    def compared(self, references: np.ndarray, reference: Gaussian, *, seed: int) -> Compared:
        """The set beside the features (R, D) and the Gaussian of a reference."""
        arrays = [read_arrays(job.folder, job.name) for job in self.files]
        logits = np.concatenate([each[LOGITS] for each in arrays]) if all(LOGITS in each for each in arrays) else None
        features = np.concatenate([each[FEATURES] for each in arrays])
        return Compared(features, references, reference, seed=seed, logits=logits)


class FeatureMeasurer:
    """Pool worker that computes the features of a part and writes the file of features."""

    def __init__(self, config: MeasureConfig) -> None:
        self.features = extractor_of(config)

    def __call__(self, job: FeatureJob) -> Later:
        made = joined([self.features(images) for images in job.part.batches()])
        return Later(partial(write_job, job.folder, job.name, pack(**made)))


def extractor_of(config: MeasureConfig) -> FeatureExtractor:
    """The network of a configuration. Raises as FeatureExtractor."""
    return FeatureExtractor(config.feature_network, precision=config.precision, weights=config.feature_weights)


def joined(parts: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Arrays of batches in order, by name; empty without batches."""
    return {name: np.concatenate([part[name] for part in parts]) for name in (parts[0] if parts else ())}


def feature_job(part: ImagePart, *facts: Any) -> FeatureJob:
    """The job of a part, named by the part's content and the facts that decide its features."""
    content = json.dumps([PROTOCOL, *facts, _content(part)])
    return FeatureJob(hashlib.sha256(content.encode()).hexdigest()[:20], part, part.place.join(FEATURES))


def _content(value: Any) -> Any:
    """All that decides the images of a part, for JSON; an address is no part of it."""
    match value:
        case ShardIndex():
            return [entry.sha256 for entry in value.shards]
        case Store():
            return None
        case tuple() if hasattr(value, "_fields"):
            return [type(value).__name__, *map(_content, value)]
    return value


def measure_features(
    sets: Mapping[str, ImageSet],
    config: MeasureConfig,
    *,
    pool: Pool,
    progress: Callable[[int, int], None],
    anew: Store | None = None,
) -> list[FeatureSet]:
    """Measures each set of at least two images; features that are there already are kept.

    Args:
        progress: called with images done and their total.
        anew: the work of a forced try, which takes no features of before; see `finish_features`.
    """
    facts = config.facts()
    jobs = {
        name: tuple(feature_job(part, *facts) for part in images.parts)
        for name, images in sets.items()
        if images.num_images > 1
    }
    every = list({(job.folder, job.name): job for group in jobs.values() for job in group}.values())
    finish_features(partial(FeatureMeasurer, config), every, pool=pool, progress=progress, anew=anew)
    return [FeatureSet(name, sets[name].purpose, group) for name, group in jobs.items()]


def finish_features(
    make_worker: Callable[[], Any],
    jobs: list[FeatureJob],
    *,
    pool: Pool,
    progress: Callable[[int, int], None],
    anew: Store | None = None,
) -> None:
    """Does the jobs without a whole file, folder by folder.
    A forced try withdraws the records of all its jobs once, and notes so in its work `anew`: killed, it goes on."""
    done, total = 0, sum(job.part.num_images for job in jobs)
    for folder in dict.fromkeys(job.folder for job in jobs):
        group = [job for job in jobs if job.folder == folder]
        if anew is not None and not anew.exists(note := f"withdrawn/{group[0].name}"):
            in_parallel(folder.delete, [record_path(job.name) for job in group])
            anew.write(note, b"")
        for job in pool.finish(make_worker, group, files=folder):
            progress(done := done + job.part.num_images, total)


def pack(**arrays: np.ndarray) -> bytes:
    """Packs arrays as npz without compression: features hardly get smaller."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # pyrefly: ignore[bad-argument-type]
    return buffer.getvalue()


def read_arrays(files: Store, job: str) -> dict[str, np.ndarray]:
    """All arrays of a finished job by name."""
    with np.load(io.BytesIO(files.read(file_name(job))), allow_pickle=False) as arrays:
        return dict(arrays)


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
        compared = images.compared(self.references, self.reference, seed=self.seed)
        return measured_row(images.name, images.purpose, compared, self.metrics)


def measured_row(name: str, purpose: Purpose, compared: Compared, metrics: Sequence[str] = ()) -> DistanceRow:
    """The figures of a set; None for those that need more images."""
    chosen = {metric: METRICS[metric] for metric in ("distance", *metrics)}
    enough = {name: compared.images(metric.reads) >= metric.images for name, metric in chosen.items()}
    figures = {name: metric.measure(compared) if enough[name] else None for name, metric in chosen.items()}
    if "distance" in metrics:
        figures["standard_error"] = distance_error(compared.features, compared.reference, seed=compared.seed)
    return DistanceRow.model_validate(figures | {"name": name, "samples": len(compared.features), "purpose": purpose})


def packed_reference(images: FeatureSet) -> bytes:
    """Packed Gaussian of a set, from the files of features. Runs in a worker."""
    return pack_gaussian(gaussian_of(images.read()))
