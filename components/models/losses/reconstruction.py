"""Reconstruction losses of an autoencoder, and the image in the decoder's output.

    l1                    mean absolute difference, as in the published code of VQ-GAN (Esser et al. 2021)
    mse                   mean squared difference (van den Oord et al. 2017)
    logit_laplace         -log density in nats (Ramesh et al. 2021, appendix A.3)
    discretized_logistic  -log probability of 8-bit values in nats (Salimans et al. 2017, "PixelCNN++", equation 2, with
                          one component): the only kind that gives bits per dimension

Shapes: B batch, H W pixels, O channels of the output: 3, or 6 where a location has a log-scale.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

LOGIT_LAPLACE_EPS = 0.1
HALF_LEVEL = 1 / 255  # of 256 levels over [-1, 1]
MIN_LOG_SCALE = -7.0


def discretized_logistic_nll(output: Tensor, *, image: Tensor) -> Tensor:
    """-log P of each 8-bit value in nats, (B, 3, H, W) fp32, under a discretized logistic.

    P is the logistic's mass within half a level around the value. The two edges are open, so that the 256 probabilities
    sum to one.

    Args:
        output: (B, 6, H, W), means in [-1, 1] and log-scales; log-scales below -7 count as -7.
        image: (B, 3, H, W) in [-1, 1], of 8 bits.
    """
    mean, log_scale = output.float().chunk(2, dim=1)
    log_scale = log_scale.clamp(min=MIN_LOG_SCALE)
    image = image.float()
    inverse_scale = (-log_scale).exp()
    above, below = ((image - mean + side) * inverse_scale for side in (HALF_LEVEL, -HALF_LEVEL))
    # sigmoid(a) - sigmoid(b) = sigmoid(a) sigmoid(-b) (1 - exp(b - a)): no difference of near numbers, no clamp
    up_to = F.logsigmoid(above)  # log P(at most the level), where below is minus infinity
    from_on = F.logsigmoid(-below)
    between = up_to + from_on + torch.log(-torch.expm1(-2 * HALF_LEVEL * inverse_scale))
    log_probability = torch.where(image < -0.999, up_to, torch.where(image > 0.999, from_on, between))
    return -log_probability


def discretized_logistic_image(output: Tensor) -> Tensor:
    """Return the means of `output` (B, 6, H, W): (B, 3, H, W), near [-1, 1]."""
    return output.chunk(2, dim=1)[0]


def logit_laplace_nll(output: Tensor, *, image: Tensor) -> Tensor:
    """-log f of each value in nats, (B, 3, H, W) fp32, of the density on (0, 1)

        log f(y) = -log(2b) - log(y (1 - y)) - |logit(y) - mu| / b,

    where y = (1 - 2 eps) x + eps and x is the image in [0, 1]. A density may exceed one, so nats may be negative.

    Args:
        output: (B, 6, H, W), mu and log b.
        image: (B, 3, H, W) in [-1, 1].
    """
    mean, log_scale = output.float().chunk(2, dim=1)
    y = (1 - 2 * LOGIT_LAPLACE_EPS) * (image.float() + 1) / 2 + LOGIT_LAPLACE_EPS
    distance = (y.logit() - mean).abs() * (-log_scale).exp()
    return math.log(2) + log_scale + (y * (1 - y)).log() + distance


def logit_laplace_image(output: Tensor) -> Tensor:
    """The image at mu, by the sigmoid and the inverse map: (B, 6, H, W) -> (B, 3, H, W), in [-1.25, 1.25]."""
    mean = output.chunk(2, dim=1)[0]
    return 2 * (mean.sigmoid() - LOGIT_LAPLACE_EPS) / (1 - 2 * LOGIT_LAPLACE_EPS) - 1


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
