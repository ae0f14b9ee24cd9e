"""From noise to pictures: ancestral sampling (Ho et al., 2020, algorithm 2) and DDIM (Song et al., 2021, equation 12).

Both clip x_0 to [-1, 1] at every step and run on any subset of the training steps.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from components.diffusion.objective import PredictionType, predict_noise, predict_x_0
from components.diffusion.schedule import Schedule, gather

SamplerName = Literal["ddpm", "ddim"]
Denoise = Callable[[Tensor, Tensor], Tensor]  # (x_t (B, C, H, W), timesteps (B,) int64) -> prediction (B, C, H, W)
OnStep = Callable[[int, int, Tensor, Tensor], None]  # (step from 0, timestep, x_t, clipped x_0)


def spaced_timesteps(num_train_timesteps: int, num_inference_steps: int) -> list[int]:
    """Evenly spread steps, ascending, with both ends kept: 250 of 1000 are 0, 4, 8, ... 995, 999.

    A single step is the last one, the only one that starts from noise.

    Raises:
        ValueError: num_inference_steps is not in [1, num_train_timesteps].
    """
    if not 1 <= num_inference_steps <= num_train_timesteps:
        raise ValueError(f"num_inference_steps must be in [1, {num_train_timesteps}], not {num_inference_steps}")
    if num_inference_steps == 1:
        return [num_train_timesteps - 1]
    stride = (num_train_timesteps - 1) / (num_inference_steps - 1)
    return [round(i * stride) for i in range(num_inference_steps)]


@torch.no_grad()
def sample(
    denoise: Denoise,
    schedule: Schedule,
    x_t: Tensor,
    *,
    prediction_type: PredictionType,
    sampler: SamplerName,
    num_inference_steps: int,
    noise: Callable[[int], Tensor],
    eta: float = 0.0,
    on_step: OnStep | None = None,
) -> Tensor:
    """Turn noise x_t (B, C, H, W), the sample of the last step, into x_0 of the same shape in [-1, 1].

    Args:
        denoise: the network with its conditions bound and guidance applied; it sees original timesteps.
        sampler: "ddpm" (the small, fixed variance) or "ddim".
        noise: standard normal noise like x_t for each step from 0; asked for in order, only where it is used.
        eta: DDIM only, in [0, 1]: 0 is deterministic, 1 has the variance of "ddpm".
        on_step: called after each denoising with the step, its original timestep, x_t before it and the clipped x_0.

    Raises:
        ValueError: an unknown sampler, eta or num_inference_steps out of range.
    """
    if sampler not in ("ddpm", "ddim"):
        raise ValueError(f"unknown sampler {sampler!r}: choose ddpm or ddim")
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be in [0, 1], not {eta}")
    strided = schedule.respaced(spaced_timesteps(len(schedule), num_inference_steps))
    for step, index in enumerate(reversed(range(len(strided)))):
        timestep = int(strided.timesteps[index])
        prediction = denoise(x_t, torch.full((x_t.shape[0],), timestep, device=x_t.device))
        indices = torch.full((x_t.shape[0],), index, device=x_t.device)
        x_0 = predict_x_0(strided, prediction=prediction, x_t=x_t, timesteps=indices, prediction_type=prediction_type)
        x_0 = x_0.clamp(-1, 1)
        if on_step is not None:
            on_step(step, timestep, x_t, x_0)
        random = noise(step) if index > 0 and (sampler == "ddpm" or eta > 0) else None  # the last step adds none
        if sampler == "ddpm":
            x_t = ddpm_step(strided, x_0=x_0, x_t=x_t, indices=indices, noise=random)
        else:
            x_t = ddim_step(strided, x_0=x_0, x_t=x_t, indices=indices, noise=random, eta=eta)
    return x_t


def ddpm_step(schedule: Schedule, *, x_0: Tensor, x_t: Tensor, indices: Tensor, noise: Tensor | None) -> Tensor:
    """x_{t-1} from the posterior of a predicted x_0, plus its standard deviation times the noise if there is one."""
    mean, log_variance = schedule.posterior(x_0, x_t, indices)
    return mean if noise is None else mean + (0.5 * log_variance).exp() * noise


def ddim_step(
    schedule: Schedule, *, x_0: Tensor, x_t: Tensor, indices: Tensor, noise: Tensor | None, eta: float
) -> Tensor:
    """x_{t-1} of Song et al. (2021), equation 12, with the noise derived again from the clipped x_0."""
    alphas_cumprod, previous = schedule.alphas_cumprod, schedule.alphas_cumprod_prev
    variance = eta**2 * (1 - previous) / (1 - alphas_cumprod) * (1 - alphas_cumprod / previous)  # equation 16
    epsilon = predict_noise(schedule, prediction=x_0, x_t=x_t, timesteps=indices, prediction_type="sample")
    direction = gather((1 - previous - variance).clamp(min=0).sqrt(), indices, x_t) * epsilon
    mean = gather(previous.sqrt(), indices, x_t) * x_0 + direction
    return mean if noise is None else mean + gather(variance.sqrt(), indices, x_t) * noise
