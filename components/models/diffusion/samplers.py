"""Sampling from noise to images: any sampler of `steps.py`, any objective, any number of steps.
Shapes: B batch; images and latents are (B, C, H, W)."""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from components.models.diffusion.objective import Objective
from components.models.diffusion.steps import SAMPLERS, Prediction, SamplerName, Spaced

Threshold = Literal["static", "dynamic", "none"]
Denoise = Callable[[Tensor, Tensor], Tensor]  # (x_t, time (B,)) -> output
Score = Callable[[Tensor, Tensor], Tensor]  # (x_t, time (B,)) -> gradient of a log probability
OnStep = Callable[[int, float, Tensor, Tensor], None]  # (step from 0, time, x_t, x_0)


class Known(NamedTuple):
    """The given part of the images: noised to each level, the given pixels replace the sampled pixels."""

    image: Tensor  # (B, C, H, W)
    mask: Tensor  # (B, 1, H, W) bool, true where the image is known
    noise: Tensor  # (B, C, H, W) standard normal

    def put(self, x_t: Tensor, signal: float, sigma: float) -> Tensor:
        """Return x_t with the given part, noised to the level (signal, sigma), in the masked places."""
        return torch.where(self.mask, signal * self.image + sigma * self.noise, x_t)


class Start(NamedTuple):
    """Initial image of sampling: the image is noised, and only the last steps are taken.
    Sources: SDEdit, Meng et al. (2022); for super-resolution, Chung et al. (2022)."""

    image: Tensor  # (B, C, H, W)
    steps: int


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
    spacing: Spaced | None = None,
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
        noise: standard normal noise like x_T for each step from 0; requested in order, and only for steps that use
            noise.
        eta: of samplers with such an option (DDIM), in [0, 1]: 0 is deterministic, 1 has the small variance of "ddpm".
        spacing: of a discrete objective's steps, see `spaced_timesteps`; None is the sampler's own.
        threshold: of each predicted x_0: "static" clips to [-1, 1], "dynamic" to the percentile of each image,
            "none" is for latents.
        score: of a classifier, times its scale (Dhariwal and Nichol, 2021): algorithm 1 for "ddpm", algorithm 2, which
            shifts the predicted noise, for the others.
        known: the given part of the images, for models without training in filling in.
        start: the image that x_T noises where sampling does not start from noise alone.
        on_step: called after each denoising with the step, the time, x_t before the step and the thresholded x_0.

    Raises ValueError for an unknown sampler, or eta, percentile or num_inference_steps out of range."""
    check_options(sampler, eta, percentile)
    kind = SAMPLERS[sampler]
    levels = objective.trajectory(num_inference_steps, spacing=spacing or kind.spacing)
    solver = kind(objective.log_variance, eta=eta, scaled=bool((levels.signal > 0).all()))
    levels = levels if start is None else levels.last(start.steps)

    def predict(x_t: Tensor, index: int) -> tuple[Tensor, Tensor, Tensor | None]:
        time = torch.full((len(x_t),), levels.times[index].item(), dtype=levels.times.dtype, device=x_t.device)
        output = denoise(x_t, time)
        x_0 = thresholded(objective.predict_x_0(output, x_t=x_t, time=time), threshold, percentile)
        gradient = None if score is None else score(x_t, time)
        signal, sigma = levels.signal[index].item(), levels.sigma[index].item()
        if gradient is not None and solver.shifts_x_0 and signal > 0:  # pure noise has no class
            x_0 = x_0 + sigma**2 / signal * gradient  # from epsilon - sigma * gradient
        return x_0, output, gradient

    x_t = levels.initial_scale * noise_x_T
    if start is not None:  # the start image, noised to the first level
        x_t = levels.signal[0].item() * start.image + levels.sigma[0].item() * noise_x_T
    for index in range(len(levels)):
        step = levels.step(index)
        x_t = x_t if known is None else known.put(x_t, step.signal, step.sigma)
        x_0, output, gradient = predict(x_t, index)
        if on_step is not None:
            on_step(index, levels.times[index].item(), x_t, x_0)
        random = noise(index) if solver.draws and step.next_sigma > 0 else None  # the last step adds none
        x_t = solver.step(Prediction(step, x_t, x_0, output, gradient, random), lambda x, i=index + 1: predict(x, i)[0])
    return x_t if known is None else torch.where(known.mask, known.image, x_t)


def check_options(sampler: str, eta: float, percentile: float) -> None:
    """Raise ValueError, in a single line, for an unknown sampler or a number out of range."""
    if sampler not in SAMPLERS:
        *names, last = SAMPLERS
        raise ValueError(f"unknown sampler {sampler!r}: choose {', '.join(names)} or {last}")
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be in [0, 1], not {eta}")
    if not 0 < percentile <= 1:
        raise ValueError(f"percentile must be in (0, 1], not {percentile}")


def thresholded(x_0: Tensor, threshold: Threshold, percentile: float) -> Tensor:
    """A predicted image, limited to the range of images by the named rule.
    "dynamic" clips each image to the image's own quantile of |x_0| and scales that quantile to 1 (Saharia et al., 2022,
    Imagen, section 2.3); for a quantile below 1 this is the clipping to [-1, 1] of "static". "none" changes nothing."""
    if threshold == "none":
        return x_0
    if threshold == "static":
        return x_0.clamp(-1, 1)
    bound = quantile(x_0.flatten(1).abs(), percentile).clamp(min=1)
    bound = bound.reshape(-1, *[1] * (x_0.ndim - 1))
    return x_0.clamp(-bound, bound) / bound


def quantile(values: Tensor, share: float) -> Tensor:
    """The quantile (B,) of each row of values (B, N), any number; `torch.quantile` takes at most 2^24."""
    place = share * (values.shape[1] - 1)
    below = math.floor(place)
    low, high = (values.kthvalue(min(rank, values.shape[1]), dim=1).values for rank in (below + 1, below + 2))
    return torch.lerp(low, high, place - below)
