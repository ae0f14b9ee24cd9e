"""Reconstruction losses, and the image in a decoder's output.

    l1                    mean absolute difference, as in the published code of VQ-GAN (Esser et al. 2021)
    mse                   mean squared difference (van den Oord et al. 2017)
    logit_laplace         -log density in nats (Ramesh et al. 2021, appendix A.3)
    discretized_logistic  -log probability of 8-bit values in nats (Salimans et al. 2017, "PixelCNN++", equation 2, with
                          one component): the only kind that gives bits per dimension

Shapes: B batch, H W pixels, O channels of the output: 3, or 6 where a location has a log-scale."""

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
    sum to one. `output` (B, 6, H, W) holds means in [-1, 1] and log-scales, of which those below -7 count as -7;
    `image` is (B, 3, H, W) in [-1, 1], of 8 bits."""
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


def logit_laplace_nll(output: Tensor, *, image: Tensor) -> Tensor:
    """-log f of each value in nats, (B, 3, H, W) fp32, of the density on (0, 1)

        log f(y) = -log(2b) - log(y (1 - y)) - |logit(y) - mu| / b,

    where y = (1 - 2 eps) x + eps and x is the image in [0, 1]. A density may exceed one, so nats may be negative.
    `output` (B, 6, H, W) holds mu and log b; `image` is (B, 3, H, W) in [-1, 1]."""
    mean, log_scale = output.float().chunk(2, dim=1)
    y = (1 - 2 * LOGIT_LAPLACE_EPS) * (image.float() + 1) / 2 + LOGIT_LAPLACE_EPS
    distance = (y.logit() - mean).abs() * (-log_scale).exp()
    return math.log(2) + log_scale + (y * (1 - y)).log() + distance


LIKELIHOODS = {"logit_laplace": logit_laplace_nll, "discretized_logistic": discretized_logistic_nll}
KINDS = ("l1", "mse", *LIKELIHOODS)


def reconstruction_loss(output: Tensor, *, image: Tensor, kind: str = "l1") -> Tensor:
    """Mean loss of the decoder's output (B, O, H, W) for images (B, 3, H, W) in [-1, 1], () in fp32."""
    if kind in LIKELIHOODS:
        return LIKELIHOODS[kind](output, image=image).mean()
    difference = F.mse_loss if kind == "mse" else F.l1_loss
    return difference(output.float(), image.float())


def output_channels(*, kind: str, channels: int = 3) -> int:
    """Number O of the decoder's output channels, once or twice the image's; ValueError for unknown kinds."""
    if kind not in KINDS:
        raise ValueError(f"unknown reconstruction {kind!r}: choose {', '.join(KINDS)}")
    return 2 * channels if kind in LIKELIHOODS else channels


def image_of(output: Tensor, *, kind: str = "l1") -> Tensor:
    """Return the image (B, 3, H, W) in an output (B, O, H, W), near [-1, 1] and not clipped."""
    if kind not in LIKELIHOODS:
        return output
    mean = output.chunk(2, dim=1)[0]
    if kind == "discretized_logistic":
        return mean
    # The image at mu, by the sigmoid and the inverse map, in [-1.25, 1.25].
    return 2 * (mean.sigmoid() - LOGIT_LAPLACE_EPS) / (1 - 2 * LOGIT_LAPLACE_EPS) - 1
