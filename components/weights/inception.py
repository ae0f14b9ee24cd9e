"""Inception-v3 as the field's figures have it, by torch-fidelity's own class with weights by URI.

FID (Heusel et al., 2017), KID, Inception score, precision and recall of papers are of TensorFlow's network of
2015-12-05, whose layers differ from torchvision's; torch-fidelity's class computes as that one does. Two protocols
lead from pixels to its 299²: `inception` resizes as TensorFlow 1 did (bilinear, without antialiasing: the figures of
most papers, of ADM and of torch-fidelity); `inception_clean` as clean-fid does (bicubic by Pillow, antialiased, in
floating point; Parmar et al., 2022, "On Aliased Resizing and Surprising Subtleties in GAN Evaluation").

Shapes: N images, H W their pixels.
"""

import io
from typing import Any

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor, nn

from components.weights.files import WeightsFile

SIDE = 299  # pixels of the network's input
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
KNOWN = (
    "torch-fidelity's weights-inception-2015-12-05-6726825d.pth, the same as pytorch-fid's pt_inception-… "
    f"(95,628,359 bytes, sha256 {SHA256})"
)


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
        torch.save(file.tensors, given := io.BytesIO())  # the class unpickles a file: it gets one of tensors alone
        given.seek(0)
        layers = ["2048", "logits_unbiased"]
        network = FeatureExtractorInceptionV3("inception-v3-compat", layers, feature_extractor_weights_path=given)
        *convolutions, last = network.children()  # in the order of its own `forward`, which takes 8 bits alone
        self.fc: Any = last
        self.features = nn.Sequential(*convolutions)

    def resized(self, images: np.ndarray) -> Tensor:
        """uint8 (N, H, W, 3) -> float32 (N, 3, 299, 299) in [0, 255]."""
        return resized_as_tensorflow(images, SIDE, like=self.fc.weight)

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
        resized = [Image.fromarray(plane).resize((SIDE, SIDE), Image.Resampling.BICUBIC) for plane in planes]
        image = np.stack([np.asarray(plane).clip(0, 255) for plane in resized])
        return rearrange(torch.from_numpy(image), "(n c) h w -> n c h w", c=3).to(self.fc.weight)
