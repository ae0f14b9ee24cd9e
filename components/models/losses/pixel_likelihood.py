"""Likelihoods of images under a location and a log-scale for each value of each pixel.

The decoder outputs locations and log-scales. Sources: Salimans et al. 2017, "PixelCNN++", equation 2 (logistic on 256
levels, one component); Ramesh et al. 2021, "Zero-Shot Text-to-Image Generation", appendix A.3 (logit-Laplace).

Shapes: B batch, H W pixels.
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
