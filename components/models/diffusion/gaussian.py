"""Gaussians of the reverse process: variance, divergence, and the likelihood of 8-bit values.

All tensors are broadcast to (B, ...); everything is in nats and differentiable.
"""

import torch
from torch import Tensor

DATA_STEP = 2 / 255  # distance of neighbors among the 256 values in [-1, 1]


def interpolated_log_variance(values: Tensor, *, small: Tensor, large: Tensor) -> Tensor:
    """Log of the learned variance: values in [-1, 1] span small to large, not squashed.

    Source: Nichol and Dhariwal (2021), equation 15.

    Args:
        values: the second half of the network's channels (B, C, H, W).
        small, large: log of the posterior variance and of beta, for the steps actually taken.
    """
    fraction = (values + 1) / 2
    return fraction * large + (1 - fraction) * small


def normal_kl(mean_1: Tensor, log_variance_1: Tensor, mean_2: Tensor, log_variance_2: Tensor) -> Tensor:
    """KL divergence from the first diagonal Gaussian to the second, element by element."""
    difference = log_variance_2 - log_variance_1
    return 0.5 * (difference - 1 + (-difference).exp() + (mean_1 - mean_2) ** 2 * (-log_variance_2).exp())


def discretized_gaussian_nll(x_0: Tensor, *, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Negative log likelihood of 8-bit values in [-1, 1], element by element.

    Source: Ho et al. (2020), equation 13.

    Each value owns the interval of 2/255 around the value, and the two end values own the tails beyond, so the 256
    probabilities add up to 1. The normal distribution function is exact; Improved DDPM uses a tanh approximation here.
    Differences are taken of logarithms in the lower tail, so that neither a far mean nor a narrow Gaussian rounds to
    zero.
    """
    inverse = (-0.5 * log_variance).exp()
    upper, lower = (x_0 - mean + DATA_STEP / 2) * inverse, (x_0 - mean - DATA_STEP / 2) * inverse
    flip = upper + lower > 0  # mirror an interval mostly above the mean
    low, high = torch.where(flip, -upper, lower), torch.where(flip, -lower, upper)
    log_high = torch.special.log_ndtr(high)
    ratio = (torch.special.log_ndtr(low) - log_high).clamp(max=-torch.finfo(x_0.dtype).tiny)
    inside = log_high + (-torch.expm1(ratio)).log()
    above = torch.where(x_0 > 0.999, torch.special.log_ndtr(-lower), inside)
    return -torch.where(x_0 < -0.999, torch.special.log_ndtr(upper), above)
