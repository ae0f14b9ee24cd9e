"""Feature networks by name, each with its own protocol from pixels to features.

A missing network is an error: features of a random network are never used, and no weights are fetched at run time.

`efficientnet_lite0` comes from two small packages and needs no network access. The networks of papers take weights by
URI, and are computed in fp32. Their protocols stand in `components/weights/features.py`.

Shapes: N images, H W their pixels, D features: 1280 of efficientnet_lite0, 2048 of Inception, 1024 of DINOv2 ViT-L.
"""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import nn

from components.runtime.storage.connection import StoreError
from components.sampling.device import best_device, computes_bf16
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


class FeatureNetworkError(ValueError):
    """The chosen feature network is not available; the message tells how to get what is missing."""


class Network(NamedTuple):
    """A feature network: its constructor, its packages, and the weights that it is given."""

    make: Callable[..., nn.Module]  # of a file of weights, where it takes one
    packages: tuple[str, ...]
    extra: str
    weights: str = ""  # file, size and sha256 of the published weights; empty: they come with the packages


NETWORKS = {
    "efficientnet_lite0": Network(Lite0, PACKAGES, "features"),
    "inception": Network(Inception, ("torch_fidelity",), "fidelity", INCEPTION_WEIGHTS),
    "inception_clean": Network(CleanInception, ("torch_fidelity",), "fidelity", INCEPTION_WEIGHTS),
    "dinov2": Network(Dinov2, ("torch_fidelity", "transformers"), "fidelity,text", DINOV2_WEIGHTS),
}


def lacking_weights(network: FeatureNetwork, weights: str | None) -> str:
    """The fault of weights that are missing, or given to a network that has its own; empty for none."""
    known = "" if network == "none" else NETWORKS[network].weights
    if known and weights is None:
        return f"feature_network {network} needs feature_weights, the URI of {known}; nothing is fetched by itself"
    return f"feature_network {network} takes no feature_weights; leave them out" if weights and not known else ""


def check_feature_network(network: FeatureNetwork, weights: str | None = None) -> str:
    """Check before anything is started; returns the sha256 of the weights, read whole, or "" without any.
    Raises FeatureNetworkError if a package is not installed, or the weights are missing or another network's."""
    if network == "none":
        return ""
    chosen = NETWORKS[network]
    missing = [package.replace("_", "-") for package in chosen.packages if find_spec(package) is None]
    if missing:
        raise FeatureNetworkError(
            f"feature_network {network} needs {' '.join(missing)}: pip install 'image-cascade[{chosen.extra}]', "
            "or choose none (no distance is measured then)"
        )
    if fault := lacking_weights(network, weights):
        raise FeatureNetworkError(fault)
    return _load(network, weights)[1] if weights else ""


def _load(network: FeatureNetwork, weights: str | None) -> tuple[nn.Module, str]:
    """The network and the sha256 of its weights. Raises FeatureNetworkError for weights that do not fit."""
    chosen = NETWORKS[network]
    if weights is None:
        return chosen.make(), ""
    try:
        file = read_weights(weights)
        return chosen.make(file), file.sha256
    except (ValueError, OSError, RuntimeError, StoreError) as error:
        reason = str(error).strip().replace("\n\t", " ").splitlines()[0][:200]
        raise FeatureNetworkError(f"feature_weights {weights}: {reason}; {network} takes {chosen.weights}") from error


class FeatureExtractor:
    """Turns images of any size into feature vectors, by the protocol of the network."""

    def __init__(
        self,
        network: FeatureNetwork = "efficientnet_lite0",
        *,
        precision: FeaturePrecision = "fp32",
        weights: str | None = None,
    ) -> None:
        """Raises FeatureNetworkError for missing weights, ValueError for "none"."""
        if network == "none":
            raise ValueError("feature_network none has no features; measure no distance then")
        if fault := lacking_weights(network, weights):
            raise FeatureNetworkError(fault)
        device = best_device()
        dtype = torch.bfloat16 if computes_bf16(precision, device) else torch.float32
        module: Any = _load(network, weights)[0]
        self.module = module.to(device, dtype, memory_format=torch.channels_last)

    @torch.inference_mode()
    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """uint8 (N, H, W, 3) -> arrays (N, ...) float32 by name: `features`, and `logits` of a classifier."""
        starts = range(0, max(1, len(images)), BATCH)
        parts = [self.module(images[start : start + BATCH]) for start in starts]
        return {name: torch.cat([part[name] for part in parts]).cpu().numpy() for name in parts[0]}
