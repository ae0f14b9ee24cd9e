"""From noise to images: ancestral sampling (Ho et al., 2020, algorithm 2), DDIM (Song et al., 2021), DPM-Solver++(2M)
and its SDE (Lu et al., 2022), Heun and Euler (Karras et al., 2022), on any number of steps of any objective.

Shapes: B batch; images and latents are (B, C, H, W).
"""

from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from components.models.diffusion.objective import Objective
from components.models.diffusion.steps import (
    ddim_step,
    ddpm_log_variances,
    ddpm_step,
    extrapolated,
    heun_step,
    threshold_dynamically,
)
from components.models.diffusion.trajectory import Spacing, Step, Trajectory

SamplerName = Literal["ddpm", "ddim", "dpm_solver_pp", "sde_dpm_solver_pp", "heun", "euler"]
SAMPLERS: tuple[SamplerName, ...] = get_args(SamplerName)
Threshold = Literal["static", "dynamic", "none"]
Denoise = Callable[[Tensor, Tensor], Tensor]  # (x_t, time (B,)) -> output
Score = Callable[[Tensor, Tensor], Tensor]  # (x_t, time (B,)) -> gradient of a log probability at x_t, like x_t
OnStep = Callable[[int, float, Tensor, Tensor], None]  # (step from 0, time, x_t, x_0)


class Known(NamedTuple):
    """What of the images is given: it is noised to each level and put in the place of what was made there."""

    image: Tensor  # (B, C, H, W)
    mask: Tensor  # (B, 1, H, W) bool, true where the image is known
    noise: Tensor  # (B, C, H, W) standard normal


class Start(NamedTuple):
    """An image near to the one that is made: it is noised, and only the last steps are taken (SDEdit; Meng et al.,
    2022; for super-resolution Chung et al., 2022)."""

    image: Tensor  # (B, C, H, W)
    steps: int


class Prediction(NamedTuple):
    output: Tensor  # of the network
    x_0: Tensor  # thresholded, and moved by the gradient but for "ddpm", which moves its mean
    gradient: Tensor | None  # of the score's log probability


@torch.no_grad()
def sample(
    denoise: Denoise,
    objective: Objective,
    noise_x_T: Tensor,  # noqa: N803
    *,
    sampler: SamplerName,
    num_inference_steps: int,
    noise: Callable[[int], Tensor],
    eta: float = 0.0,
    spacing: Spacing | None = None,
    threshold: Threshold = "static",
    percentile: float = 0.995,
    score: Score | None = None,
    known: Known | None = None,
    start: Start | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Turn standard normal noise x_T (B, C, H, W) into x_0 of the same shape.

    Args:
        denoise: the network with its conditions bound and guidance applied.
        sampler: "ddpm" has the objective's variance; "heun" runs the network twice in every step but the last;
            "sde_dpm_solver_pp" draws noise in every step as "ddpm" does, "dpm_solver_pp" draws none.
        noise: standard normal noise like x_T for each step from 0; asked for in order, only where it is used.
        eta: DDIM only, in [0, 1]: 0 is deterministic, 1 has the small variance of "ddpm".
        spacing: of a discrete objective's steps; None is "linspace" for "ddpm" and "ddim", "karras" for the others,
            which need it to be near at few steps.
        threshold: of each predicted x_0: "static" clips to [-1, 1], "dynamic" to the percentile of each image,
            "none" is for latents.
        score: of a classifier, times its scale (Dhariwal and Nichol, 2021): algorithm 1 for "ddpm", algorithm 2, which
            shifts the predicted noise, for the others.
        known: where the image is given, for models that were not trained to fill in.
        start: what is noised by x_T where sampling does not start from noise alone.
        on_step: called after each denoising with the step, its time, x_t before it and the thresholded x_0.

    Raises:
        ValueError: an unknown sampler, or eta, percentile or num_inference_steps out of range.
    """
    _check(sampler, eta, percentile)
    spacing = spacing or ("linspace" if sampler in ("ddpm", "ddim") else "karras")
    trajectory = objective.trajectory(num_inference_steps, spacing=spacing)
    scaled = bool((trajectory.signal > 0).all())
    trajectory = trajectory if start is None else trajectory.last(start.steps)

    def predict(x_t: Tensor, index: int) -> Prediction:
        time = torch.full((len(x_t),), trajectory.times[index].item(), dtype=trajectory.times.dtype, device=x_t.device)
        output = denoise(x_t, time)
        x_0 = _thresholded(objective.predict_x_0(output, x_t=x_t, time=time), threshold, percentile)
        gradient = None if score is None else score(x_t, time)
        if gradient is not None and sampler != "ddpm":
            x_0 = _shifted(x_0, gradient, trajectory, index)
        return Prediction(output, x_0, gradient)

    x_t, before, previous_x_0 = _first(trajectory, noise_x_T, start), None, None
    eta = {"ddim": eta, "sde_dpm_solver_pp": 1.0}.get(sampler, 0.0)
    for index in range(len(trajectory)):
        step, x_t = trajectory.step(index), x_t if known is None else _put(known, x_t, trajectory.step(index))
        output, x_0, gradient = predict(x_t, index)
        if on_step is not None:
            on_step(index, trajectory.times[index].item(), x_t, x_0)
        draws = sampler == "ddpm" or eta > 0
        random = noise(index) if draws and step.next_sigma > 0 else None  # the last step adds none
        if sampler == "ddpm":
            x_next = _ancestral(objective, step, before, x_t, x_0, output, gradient, random)
        else:
            multistep = sampler in ("dpm_solver_pp", "sde_dpm_solver_pp")
            ahead = extrapolated(step, x_0=x_0, before=before, previous_x_0=previous_x_0) if multistep else x_0
            x_next = ddim_step(step, x_t=x_t, x_0=ahead, noise=random, eta=eta)
        if sampler == "heun" and step.next_sigma > 0:
            again = predict(x_next, index + 1).x_0
            x_next = heun_step(step, x_t=x_t, x_0=x_0, x_next=x_next, x_0_next=again, scaled=scaled)
        x_t, before, previous_x_0 = x_next, step, x_0
    return x_t if known is None else torch.where(known.mask, known.image, x_t)


def _first(trajectory: Trajectory, noise: Tensor, start: Start | None) -> Tensor:
    if start is None:
        return trajectory.initial_scale * noise
    return trajectory.signal[0].item() * start.image + trajectory.sigma[0].item() * noise


def _check(sampler: str, eta: float, percentile: float) -> None:
    if sampler not in SAMPLERS:
        raise ValueError(f"unknown sampler {sampler!r}: choose {', '.join(SAMPLERS[:-1])} or {SAMPLERS[-1]}")
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be in [0, 1], not {eta}")
    if not 0 < percentile <= 1:
        raise ValueError(f"percentile must be in (0, 1], not {percentile}")


def _thresholded(x_0: Tensor, threshold: Threshold, percentile: float) -> Tensor:
    if threshold == "none":
        return x_0
    return x_0.clamp(-1, 1) if threshold == "static" else threshold_dynamically(x_0, percentile=percentile)


def _shifted(x_0: Tensor, gradient: Tensor, trajectory: Trajectory, index: int) -> Tensor:
    """x_0 again from epsilon - sigma * gradient (Dhariwal and Nichol, 2021, algorithm 2); pure noise tells no class."""
    signal, sigma = trajectory.signal[index].item(), trajectory.sigma[index].item()
    return x_0 if signal == 0 else x_0 + sigma**2 / signal * gradient


def _ancestral(
    objective: Objective,
    step: Step,
    before: Step | None,
    x_t: Tensor,
    x_0: Tensor,
    output: Tensor,
    gradient: Tensor | None,
    random: Tensor | None,
) -> Tensor:
    """x_next of DDPM: its mean, moved by variance * gradient (algorithm 1), plus its deviation times the noise."""
    mean = ddpm_step(step, x_t=x_t, x_0=x_0)
    small, large = (x_t.new_tensor(value) for value in ddpm_log_variances(step, before))
    log_variance = objective.log_variance(output, like=x_t, small=small, large=large)
    if gradient is not None:
        mean = mean + log_variance.exp() * gradient
    return mean if random is None else mean + (0.5 * log_variance).exp() * random


def _put(known: Known, x_t: Tensor, step: Step) -> Tensor:
    """What is known, noised to this level, in the place of what was made there."""
    return torch.where(known.mask, step.signal * known.image + step.sigma * known.noise, x_t)
