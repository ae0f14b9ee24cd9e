"""Denoisers in closed form, of every objective: what several tests sample with."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from components.models.diffusion.discrete import DiscreteObjective
from components.models.diffusion.objective import EDMObjective, Objective, make_objective
from components.models.diffusion.samplers import sample
from components.models.diffusion.schedule import Schedule


def discrete(schedule: str = "linear", num_train_timesteps: int = 1000, **changes: Any) -> DiscreteObjective:
    values = {"kind": "discrete", "schedule": schedule, "num_train_timesteps": num_train_timesteps}
    objective = make_objective(values | {"prediction_type": "epsilon"} | changes)
    assert isinstance(objective, DiscreteObjective)
    return objective


def respaced(schedule: Schedule, steps: list[int]) -> Schedule:
    """The process of the steps alone, with betas for unchanged alphas_cumprod (Nichol and Dhariwal, 2021)."""
    alphas_cumprod = schedule.alphas_cumprod[steps]
    return Schedule(1 - alphas_cumprod / torch.cat([alphas_cumprod.new_ones(1), alphas_cumprod[:-1]]))


def seeded_noise(shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float64) -> Callable[[int], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda step: torch.randn(shape, generator=generator, dtype=dtype)


def wavy(x_t: Tensor, time: Tensor) -> Tensor:
    """A denoiser that is nobody's best, so that clipping matters; each sample is on its own."""
    return 1.5 * torch.sin(3 * x_t + time.reshape(-1, 1, 1, 1) / 100)


def output_for(objective: Objective, *, x_0: Tensor, x_t: Tensor, time: Tensor) -> Tensor:
    """The output that implies x_0."""
    signal, sigma = objective.levels(time, x_t)
    if isinstance(objective, EDMObjective):
        factors = objective.preconditioning(time, x_t)
        return (x_0 - factors.c_skip * x_t) / factors.c_out
    if not isinstance(objective, DiscreteObjective):
        return (x_t - x_0) / sigma
    if objective.prediction_type == "sample":
        return x_0
    noise = (x_t - signal * x_0) / sigma
    return noise if objective.prediction_type == "epsilon" else signal * noise - sigma * x_0


def best_denoiser(objective: Objective, mean: Tensor, covariance: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """The output for E[x_0 | x_t] of Gaussian data; images are (B, 1, 1, D)."""

    def denoise(x_t: Tensor, time: Tensor) -> Tensor:
        signal, sigma = (level[0, 0, 0, 0] for level in objective.levels(time, x_t))
        of_x_t = signal**2 * covariance + sigma**2 * torch.eye(len(mean), dtype=torch.float64)
        gain = signal * covariance @ of_x_t.inverse()
        x_0 = (mean + (x_t.flatten(1) - signal * mean) @ gain.T).reshape(x_t.shape)
        return output_for(objective, x_0=x_0, x_t=x_t, time=time)

    return denoise


def moments(
    objective: Objective, num_inference_steps: int, mean: Tensor, covariance: Tensor, *, draws: bool, **settings: Any
) -> tuple[Tensor, Tensor]:
    """Mean and covariance that a chain produces, exactly: it is affine, so unit noises one at a time are enough.

    Row 0 of the batch gets no noise at all; every other row one unit vector, in x_T or, if the sampler draws noise, at
    one step.
    """
    places = num_inference_steps if draws else 1
    sources = 2 * places
    units = torch.eye(sources, dtype=torch.float64).reshape(places, 2, sources).mT
    rows = torch.cat([torch.zeros(places, 1, 2, dtype=torch.float64), units], dim=1)
    rows = rows.reshape(places, sources + 1, 1, 1, 2)
    generated = sample(
        best_denoiser(objective, mean, covariance),
        objective,
        rows[0],
        num_inference_steps=num_inference_steps,
        noise=lambda step: rows[step + 1],
        threshold="none",
        **settings,
    ).flatten(1)
    response = generated[1:] - generated[0]
    return generated[0], response.T @ response
