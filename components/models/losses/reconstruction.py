"""Reconstruction losses of an autoencoder, and the image in the decoder's output.

    l1                    mean absolute difference, as in the published code of VQ-GAN (Esser et al. 2021)
    mse                   mean squared difference (van den Oord et al. 2017)
    logit_laplace         -log density in nats (Ramesh et al. 2021)
    discretized_logistic  -log probability of 8-bit values in nats: the only kind that gives bits per dimension

Shapes: B batch, H W pixels, O channels of the output: 3, or 6 where a location has a log-scale.
"""

import torch.nn.functional as F
from torch import Tensor

from components.models.losses.pixel_likelihood import (
    discretized_logistic_image,
    discretized_logistic_nll,
    logit_laplace_image,
    logit_laplace_nll,
)

KINDS = ("l1", "mse", "logit_laplace", "discretized_logistic")


def reconstruction_loss(output: Tensor, *, image: Tensor, kind: str = "l1") -> Tensor:
    """Mean reconstruction loss over all values of all images, () in fp32.

    Args:
        output: (B, O, H, W), the decoder's output.
        image: (B, 3, H, W) in [-1, 1].
    """
    if kind == "mse":
        return F.mse_loss(output.float(), image.float())
    if kind == "logit_laplace":
        return logit_laplace_nll(output, image=image).mean()
    if kind == "discretized_logistic":
        return discretized_logistic_nll(output, image=image).mean()
    return F.l1_loss(output.float(), image.float())


def output_channels(*, kind: str) -> int:
    """Number O of the decoder's output channels, 3 or 6. Raises ValueError for an unknown kind."""
    if kind not in KINDS:
        raise ValueError(f"unknown reconstruction {kind!r}: choose {', '.join(KINDS)}")
    return 6 if kind in ("logit_laplace", "discretized_logistic") else 3


def image_of(output: Tensor, *, kind: str = "l1") -> Tensor:
    """Return the image (B, 3, H, W) in an output (B, O, H, W), near [-1, 1] and not clipped."""
    if kind == "logit_laplace":
        return logit_laplace_image(output)
    return discretized_logistic_image(output) if kind == "discretized_logistic" else output
