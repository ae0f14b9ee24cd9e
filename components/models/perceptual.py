"""Perceptual distance LPIPS of images (Zhang et al. 2018, equation 1).

Title of the paper: "The Unreasonable Effectiveness of Deep Features".

Shapes: B batch, H W pixels; C_l H_l W_l features of layer l.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class PerceptualLoss(nn.Module):
    """Distance of two images in the unit-normalized features of a frozen network.

    Args:
        features: image (B, 3, H, W) in [-1, 1] -> list of (B, C_l, H_l, W_l); scales its input itself. It is frozen
            here and stays in eval mode, whatever mode this module is put in.
        layer_weights: one non-negative vector (C_l,) a layer, the 1x1 weights of LPIPS; None counts every channel once.
    """

    def __init__(self, features: nn.Module, *, layer_weights: Sequence[Tensor] | None = None) -> None:
        super().__init__()
        self.features = features.requires_grad_(False).eval()
        self.num_weights = 0 if layer_weights is None else len(layer_weights)
        for i, weight in enumerate(layer_weights or ()):
            self.register_buffer(f"layer_weight_{i}", weight.detach().clone().float())

    def train(self, mode: bool = True) -> "PerceptualLoss":
        super().train(mode)
        self.features.eval()
        return self

    def forward(self, reconstruction: Tensor, image: Tensor) -> Tensor:
        """Distance of each pair of images (B, 3, H, W) in [-1, 1]: (B,) fp32. No gradient reaches `image`."""
        with torch.no_grad():
            targets = [_unit(f) for f in self.features(image)]
        outputs = self.features(reconstruction)
        distance = torch.zeros(len(image), device=image.device)
        for i, (output, target) in enumerate(zip(outputs, targets, strict=True)):
            squared = (_unit(output) - target).square()  # (B, C_l, H_l, W_l)
            if self.num_weights:
                squared = squared * self.get_buffer(f"layer_weight_{i}")[:, None, None]
            distance = distance + squared.sum(dim=1).mean(dim=(1, 2))
        return distance


def _unit(features: Tensor) -> Tensor:
    """Features scaled to unit length over the channels, in fp32.

    By `vector_norm`, because sqrt has no finite gradient at dead pixels.
    """
    features = features.float()
    return features / (torch.linalg.vector_norm(features, dim=1, keepdim=True) + 1e-10)
