"""Fréchet distances of many sets of pictures to one reference, measured in parallel.

Shapes: N pictures of a set, H W their pixels, D features.
"""

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import Field

from components.configuration import Config
from components.evaluation.distance import Gaussian, distance_of_halves, frechet_distance, gaussian_of
from components.evaluation.features import FeatureExtractor, FeatureNetwork, FeaturePrecision
from components.evaluation.parallel import map_parts
from components.execution import Resources

PART = 128  # pictures of one task
REFERENCE = "training pictures"
Purpose = Literal["model", "scale"]


class MeasureConfig(Config):
    """By what distances are measured, and to how many pictures."""

    feature_network: FeatureNetwork = "efficientnet_lite0"
    precision: FeaturePrecision = "fp32"  # bf16 changes distances by less than 1 %, and is faster where it is native
    reference_samples: int = Field(10_000, ge=2)  # at most so many training pictures
    seed: int = Field(0, ge=0)


class PictureSet(NamedTuple):
    """Pictures to measure. All of one size, but the sets may differ in it."""

    pictures: np.ndarray  # (N, H, W, 3) uint8
    purpose: Purpose  # what a model made, or what tells how to read the distances


class DistanceRow(Config):
    """One measured distance."""

    name: str
    distance: float
    samples: int  # N
    purpose: Purpose

    def metric(self, network: str) -> str:
        """Its name among metrics: letters, digits and underscores only."""
        return f"fd_{network}_{re.sub(r'[^a-z0-9]+', '_', self.name.lower().replace('²', '')).strip('_')}"


def measure_features(
    sets: Mapping[str, np.ndarray],
    *,
    network: FeatureNetwork,
    precision: FeaturePrecision,
    resources: Resources,
    progress: Callable[[int, int], None],
) -> dict[str, np.ndarray]:
    """Features (N, D) float32 of each set of pictures. `progress` is called with pictures done and their total."""
    parts = [
        (name, pictures[start : start + PART])
        for name, pictures in sets.items()
        for start in range(0, len(pictures), PART)
    ]
    total, done = sum(len(pictures) for _, pictures in parts), 0
    found: dict[str, list[np.ndarray]] = {name: [] for name in sets}
    make_worker = partial(FeatureExtractor, network, precision=precision)
    features = map_parts(make_worker, [pictures for _, pictures in parts], resources=resources)
    for (name, pictures), vectors in zip(parts, features, strict=True):
        found[name].append(vectors)
        progress(done := done + len(pictures), total)
    return {name: np.concatenate(vectors) for name, vectors in found.items() if vectors}


def measure_distances(
    sets: Mapping[str, PictureSet],
    *,
    network: FeatureNetwork,
    precision: FeaturePrecision,
    seed: int,
    resources: Resources,
    progress: Callable[[int, int], None],
) -> tuple[list[DistanceRow], Gaussian]:
    """The distance of each set to the one called REFERENCE, and between its halves; with the reference itself."""
    measured = {name: members for name, members in sets.items() if len(members.pictures) > 1}
    features = measure_features(
        {name: members.pictures for name, members in measured.items()},
        network=network,
        precision=precision,
        resources=resources,
        progress=progress,
    )
    return distance_rows(features, {name: members.purpose for name, members in measured.items()}, seed=seed)


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


def compared_sets(
    reference: np.ndarray,
    held_out: np.ndarray,
    reconstructions: np.ndarray | None,
    roads: Mapping[str, Mapping[str, np.ndarray]],
    *,
    seed: int,
) -> dict[str, PictureSet]:
    """What is measured against the reference: all that was made, and what tells how to read the numbers.

    Args:
        roads: road -> stage -> pictures of that stage; each stage is measured at its own size, so the base's pictures
            at, say, 16² stand beside training pictures shrunk to 16².
    """
    stages = [(road, stage, made) for road, group in roads.items() for stage, made in group.items()]
    count = max((len(made) for _, _, made in stages), default=len(held_out))
    sets = {REFERENCE: PictureSet(reference, "scale"), "held-out pictures": PictureSet(held_out, "scale")}
    for side in sorted({made.shape[1] for _, _, made in stages if made.shape[1] < reference.shape[1]}):
        name = f"{REFERENCE} shrunk to {side}²"
        sets[name] = PictureSet(shrink(spread(reference, count, seed=seed), side), "scale")
    sets["noise"] = PictureSet(noise_pictures(count, resolution=reference.shape[1], seed=seed), "scale")
    if reconstructions is not None:
        sets["reconstructions of held-out pictures"] = PictureSet(reconstructions, "model")
    for road, stage, made in stages:
        about = "" if stage == "model" else f": {stage.replace('_', ' ')}"
        name = f"{road.removesuffix('s')} road{about}, {made.shape[1]}²"
        sets[name] = PictureSet(made, "model")
    return sets


def spread(pictures: np.ndarray, count: int, *, seed: int) -> np.ndarray:
    """At most `count` of the pictures (N, H, W, 3), drawn at random."""
    return pictures[np.sort(np.random.default_rng(seed).permutation(len(pictures))[:count])]


def shrink(pictures: np.ndarray, side: int) -> np.ndarray:
    """Area-averaged (N, H, W, 3) -> (N, side, side, 3), in 8 bits: what a base model could reach at best."""
    image = rearrange(torch.from_numpy(pictures), "n h w c -> n c h w").float()
    small = F.interpolate(image, size=(side, side), mode="area").round().clamp(0, 255).byte()
    return rearrange(small, "n c h w -> n h w c").numpy()


def noise_pictures(count: int, *, resolution: int, seed: int) -> np.ndarray:
    """Independent uniform pixels (N, H, W, 3): what an untrained model may look like."""
    shape = (count, resolution, resolution, 3)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
