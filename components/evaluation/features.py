"""Features of images from a named pretrained network, kept beside the images, and figures over them.

Each network has its own protocol from pixels to features (`components/weights/features.py`). `efficientnet_lite0` comes
from two small packages; the networks of papers take weights by URI, and are computed in fp32. A missing network is an
error: no network with random weights measures, and no weights are fetched.

Features are measured part by part over all workers; each part leaves a file in the folder `features` next to its
images, named by its content, the network and the protocol. So no part is measured twice: not by a stage that was
killed, not for another figure, not for another recipe on the same images. No process holds a set's images.
Shapes: N images, H W their pixels, D features: 1280 of efficientnet_lite0, 2048 of Inception, 1024 of DINOv2 ViT-L.
"""

import hashlib
import io
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import AfterValidator, Field
from torch import nn

from components.configuration.config import Config, Since, refuse
from components.configuration.usage import nearest
from components.data.shards import ShardIndex
from components.evaluation.grids import GridBlock, render_blocks
from components.evaluation.image_sets import (
    REFERENCE,
    ImagePart,
    ImageSet,
    MadeStage,
    ShardImages,
    images_at,
    some_of,
)
from components.evaluation.metrics import (
    METRICS,
    Compared,
    DistanceRow,
    Purpose,
    distance_of_halves,
    gaussian_of,
    measured_row,
    nearest_images,
)
from components.runtime.pool import Later, Pool, file_name, write_job
from components.runtime.storage.artifact import record_path
from components.runtime.storage.connection import StoreError
from components.runtime.storage.store import Store, in_parallel
from components.sampling.device import best_device, native_bf16
from components.weights.features import (
    DINOV2_WEIGHTS,
    INCEPTION_WEIGHTS,
    PACKAGES,
    CleanInception,
    Dinov2,
    Inception,
    Lite0,
)
from components.weights.files import read_weights

# "none": no distance is measured, and the report says so
FeatureNetwork = Literal["efficientnet_lite0", "inception", "inception_clean", "dinov2", "none"]
FeaturePrecision = Literal["fp32", "bf16"]
FEATURES = "features"  # (N, D) array of the files, and the name of their folder
BATCH = 8  # images at a time: their activations stay in the processor's cache
PROTOCOL = 1  # raised with every change that moves features
LOGITS = "logits"  # array of the files, of a classifier alone
COLUMNS = 8  # images shown beside the nearest training images
QUANTILE = 0.05  # of held-out images, near by chance


class FeatureNetworkError(ValueError):
    """The chosen feature network is not available; the message tells how to get what is missing."""


class Network(NamedTuple):
    """A feature network: constructor, packages, and given weights."""

    make: Callable[..., nn.Module]  # of a file of weights, where it takes one
    packages: tuple[str, ...]
    extra: str
    # file, size and sha256 of the published weights; empty: they come with the packages
    weights: str = ""


NETWORKS = {
    "efficientnet_lite0": Network(Lite0, PACKAGES, "features"),
    "inception": Network(Inception, ("torch_fidelity",), "fidelity", INCEPTION_WEIGHTS),
    "inception_clean": Network(CleanInception, ("torch_fidelity",), "fidelity", INCEPTION_WEIGHTS),
    "dinov2": Network(Dinov2, ("torch_fidelity", "transformers"), "fidelity,text", DINOV2_WEIGHTS),
}


def _load(config: "MeasureConfig") -> tuple[nn.Module, str]:
    """The network and the sha256 of its weights. Raises FeatureNetworkError for weights that do not fit."""
    chosen, weights = NETWORKS[config.feature_network], config.feature_weights
    if weights is None:
        return chosen.make(), ""
    try:
        file = read_weights(weights)
        return chosen.make(file), file.sha256
    except (ValueError, OSError, RuntimeError, StoreError) as error:
        # torch lists missing and unexpected weights in lines of their own.
        line = (str(error).strip().replace("\n\t", " ") or type(error).__name__).splitlines()[0][:200]
        fault = f"feature_weights {weights}: {line}; {config.feature_network} takes {chosen.weights}"
        raise FeatureNetworkError(fault) from error


class FeatureExtractor:
    """Turns images of any size into feature vectors, by the protocol of the network."""

    def __init__(self, config: "MeasureConfig") -> None:
        """Raises as `MeasureConfig.check_network`, and ValueError for the network "none"."""
        refuse(config.feature_network == "none", "feature_network none has no features; measure no distance then")
        config.check_packages()
        device = best_device()
        dtype = torch.bfloat16 if config.precision == "bf16" and native_bf16(device) else torch.float32
        loaded: tuple[Any, str] = _load(config)
        module, self.sha256 = loaded  # of the weights, "" for those of a package
        self.module = module.to(device, dtype, memory_format=torch.channels_last)

    @torch.inference_mode()
    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """uint8 (N, H, W, 3) -> arrays (N, ...) float32 by name: `features`, and `logits` of a classifier."""
        starts = range(0, max(1, len(images)), BATCH)
        parts = [self.module(images[start : start + BATCH]) for start in starts]
        return {name: torch.cat([part[name] for part in parts]).cpu().numpy() for name in parts[0]}


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
    feature_weights: Annotated[str | None, Since(None)] = None  # URI, for networks without a package
    precision: FeaturePrecision = "fp32"  # bf16 where the device has it: less than 1 % apart
    reference_samples: int = Field(10_000, ge=2)  # at most so many training images
    seed: int = Field(0, ge=0, lt=2**32)  # as NumPy's RandomState takes

    def _check(self) -> None:
        super()._check()
        name = f"feature_network {self.feature_network}"
        given = self.feature_weights is not None
        known = "" if self.feature_network == "none" else NETWORKS[self.feature_network].weights
        refuse(known and not given, f"{name} needs feature_weights, the URI of {known}; nothing is fetched by itself")
        refuse(self.feature_weights and not known, f"{name} takes no feature_weights; leave them out")
        refuse(given and self.precision == "bf16", f"{name} is measured in fp32, as published; precision: fp32")

    def check_packages(self) -> None:
        """Raises FeatureNetworkError for missing packages."""
        chosen = NETWORKS[self.feature_network]
        missing = [package.replace("_", "-") for package in chosen.packages if find_spec(package) is None]
        if missing:
            raise FeatureNetworkError(
                f"feature_network {self.feature_network} needs {' '.join(missing)}: "
                f"pip install 'image-cascade[{chosen.extra}]', or choose none (no distance is measured then)"
            )

    def check_network(self) -> str:
        """Check before anything is started; returns the sha256 of the weights, read whole, or "" without any.
        Raises FeatureNetworkError if a package is not installed, or the weights are another network's."""
        if self.feature_network == "none":
            return ""
        self.check_packages()
        return _load(self)[1] if self.feature_weights else ""

    def facts(self, sha256: str | None = None) -> tuple[str, ...]:
        """All that decides features of given images; without a sha256, the weights are read for one.
        Raises FeatureNetworkError."""
        weights = self.check_network() if sha256 is None else sha256
        return (self.feature_network, self.precision, *([weights] if weights else []))


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

    def read(self) -> dict[str, np.ndarray]:
        """Arrays of the set by name, part by part in order: `features` (N, D) float32, and the files' others."""
        return joined([read_arrays(job.folder, job.name) for job in self.files])


class FeatureMeasurer:
    """Pool worker that computes the features of a part and writes the file of features."""

    def __init__(self, config: MeasureConfig) -> None:
        self.features = FeatureExtractor(config)

    def __call__(self, job: FeatureJob) -> Later:
        made = joined([self.features(images) for images in job.part.batches()])
        return Later(partial(write_job, job.folder, job.name, pack(**made)))


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


class Measuring(NamedTuple):
    """The workers of a stage that measures, and who hears of it."""

    pool: Pool
    progress: Callable[[int, int], None]  # called with images done and their total
    anew: Store | None = None  # the work of a forced try, which takes no features of before


def measure_features(sets: Mapping[str, ImageSet], config: MeasureConfig, work: Measuring) -> list[FeatureSet]:
    """Measures each set of at least two images; features that are there already are kept."""
    facts, jobs = config.facts(), dict[str, tuple[FeatureJob, ...]]()
    for name, images in sets.items():
        if images.num_images > 1:
            jobs[name] = tuple(feature_job(part, *facts) for part in images.parts)
    every = list({(job.folder, job.name): job for group in jobs.values() for job in group}.values())
    finish_features(partial(FeatureMeasurer, config), every, work)
    return [FeatureSet(name, sets[name].purpose, group) for name, group in jobs.items()]


def finish_features(make_worker: Callable[[], Any], jobs: Sequence[FeatureJob], work: Measuring) -> None:
    """Does the jobs without a whole file, folder by folder.
    A forced try withdraws the records of all its jobs once, and notes so in its work: killed, it goes on."""
    done, total = 0, sum(job.part.num_images for job in jobs)
    for folder in dict.fromkeys(job.folder for job in jobs):
        group = [job for job in jobs if job.folder == folder]
        if work.anew is not None and not work.anew.exists(note := f"withdrawn/{group[0].name}"):
            in_parallel(folder.delete, [record_path(job.name) for job in group])
            work.anew.write(note, b"")
        for job in work.pool.finish(make_worker, group, files=folder):
            work.progress(done := done + job.part.num_images, total)


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
    """Rows of figures from the files of features, first the distance between two halves of the reference.
    A reference of fewer than four images has no halves to measure. `metrics`: figures beside the distance; the
    distance's standard error if they name it. `reference`: name of the set that the others are measured to."""
    to = next((images for images in sets if images.name == reference), None)
    if to is None:
        raise ValueError(f"a distance is to at least two {reference}: give more images, or set feature_network=none")
    halves = [to] if sum(job.part.num_images for job in to.files) >= 4 else []
    ordered = [*halves, *(images for images in sets if images is not to)]
    return list(pool.map(partial(RowMeasurer, to, seed=seed, metrics=tuple(metrics)), ordered))


class RowMeasurer:
    """Pool worker that measures sets, with the features of the reference and of a single set in memory."""

    def __init__(self, to: FeatureSet, *, seed: int, metrics: tuple[str, ...]) -> None:
        self.to, self.seed, self.metrics, self.references = to, seed, metrics, to.read()[FEATURES]
        self.reference = gaussian_of(self.references)

    def __call__(self, images: FeatureSet) -> DistanceRow:
        if images == self.to:
            distance, count = distance_of_halves(self.references, seed=self.seed), len(self.references) // 2
            name = f"two halves of the {images.name}"
            empty = dict.fromkeys(metric for metric in self.metrics if metric != "distance")
            return DistanceRow(name=name, distance=distance, samples=count, purpose="scale", **empty)
        arrays, of_reference = images.read(), (self.references, self.reference)
        compared = Compared(arrays[FEATURES], *of_reference, seed=self.seed, logits=arrays.get(LOGITS))
        return measured_row(images.name, images.purpose, compared, self.metrics)


def draw_nearest(
    made: MadeStage, trained: Sequence[ShardImages], features: FeatureSet, reference: FeatureSet, held_out: FeatureSet
) -> tuple[bytes, dict[str, float]]:
    """Grid (PNG) of the images made nearest to training images, and figures: does the model copy?
    Below each stands its training image, with their distance. Held-out images say how near an image lies that was never
    trained on: a copy is much nearer. The figures, of all N images, are medians of distances to the nearest
    training image, of images made and held out, and the share of images made that are nearer than all but 5 % of
    held-out images. Runs in a worker."""
    references = reference.read()[FEATURES]
    rows, distances = nearest_images(features.read()[FEATURES], references)
    apart = nearest_images(held_out.read()[FEATURES], references)[1]
    closest = np.argsort(distances, kind="stable")[:COLUMNS]
    chosen, places = np.unique(rows[closest], return_inverse=True)
    copies = images_at(made.parts, closest.tolist())
    originals = images_at(some_of(trained, chosen), places.tolist())  # read in the order of the set
    captions = [f"{distance:.1f}" for distance in distances[closest]]
    blocks = [GridBlock("made", copies), GridBlock("nearest training images, and distance", originals, captions)]
    near = {"median": float(np.median(distances)), "held_out_median": float(np.median(apart))}
    near["share_nearer"] = float((distances < np.quantile(apart, QUANTILE)).mean())
    return render_blocks(blocks, columns=len(closest)), near
