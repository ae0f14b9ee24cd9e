"""The variational bound of discrete diffusion, in bits/dim (Ho et al., 2020, equation 5).

    -log p(x_0) <=   KL(q(x_T | x_0) | p(x_T))                                         prior
                   + sum over t > 1 of KL(q(x_{t-1} | x_t, x_0) | p(x_{t-1} | x_t))    denoising
                   - log p(x_0 | x_1)                                                  reconstruction

Shapes: B batch, N steps.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from components.models.diffusion.discrete import DiscreteObjective
from components.models.diffusion.gaussian import normal_kl
from components.models.diffusion.schedule import Schedule
from components.models.diffusion.trajectory import spaced_timesteps


class Bound(NamedTuple):
    """Terms of the variational bound of each image, in bits/dim."""

    prior: Tensor  # (B,)
    terms: Tensor  # (B, N) by ascending time: index 0 is the reconstruction, the others are denoising terms

    @property
    def reconstruction(self) -> Tensor:  # (B,)
        return self.terms[:, 0]

    @property
    def denoising(self) -> Tensor:  # (B,)
        return self.terms[:, 1:].sum(dim=1)

    @property
    def total(self) -> Tensor:  # (B,)
        return self.prior + self.terms.sum(dim=1)


@torch.no_grad()
def bound(
    denoise: Callable[[Tensor, Tensor], Tensor],
    objective: DiscreteObjective,
    x_0: Tensor,
    *,
    noise: Callable[[int], Tensor],
    num_inference_steps: int | None = None,
    clip: bool = True,
) -> Bound:
    """The bits/dim of a lossless code by the model, with a single draw of noise for each step.

    Args:
        denoise: the network with its conditions bound; (x_t, time (B,) int64) -> output.
        x_0: (B, C, H, W), 8-bit values in [-1, 1].
        noise: standard normal noise like x_0 for each index of a step, from 0.
        num_inference_steps: of the strided process, a separate model that costs more bits; None is every step.
        clip: clip each predicted x_0 to [-1, 1].

    Raises:
        ValueError: num_inference_steps is out of range.
    """
    schedule = objective.schedule
    if num_inference_steps is not None:
        schedule = schedule.respaced(spaced_timesteps(len(schedule), num_inference_steps))
    strided, terms = replace(objective, schedule=schedule), []
    for index in range(len(schedule)):
        time = torch.full((len(x_0),), index, device=x_0.device)
        x_t = strided.add_noise(x_0, noise(index), time)
        output = denoise(x_t, schedule.table("timesteps", x_0.device)[time])
        terms.append(strided.bits(output, x_0=x_0, x_t=x_t, time=time, clip=clip))
    return Bound(prior=prior_bits(schedule, x_0), terms=torch.stack(terms, dim=1))


def prior_bits(schedule: Schedule, x_0: Tensor) -> Tensor:
    """KL divergence of q(x_T | x_0) from a standard normal in bits/dim, (B,)."""
    last = torch.full((len(x_0),), len(schedule) - 1, device=x_0.device)
    signal, _ = schedule.signal_and_noise(last, x_0)
    log_variance = schedule.at("log_sigma_squared", last, x_0)
    zero = torch.zeros_like(x_0)
    nats = normal_kl(signal * x_0, log_variance, zero, zero)
    return nats.mean(dim=tuple(range(1, x_0.ndim))) / math.log(2)
