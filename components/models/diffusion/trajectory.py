"""The noise levels of a sampler, for any process of training.

At a level x_t = signal * x_0 + sigma * noise. Numbers are float64; N num_inference_steps, T num_train_timesteps.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from components.models.diffusion.steps import Spacing, Step


class Trajectory(NamedTuple):
    """Levels from noise to the clean image, and the time of each run of the network."""

    times: Tensor  # (N,) of the objective; int64 where times are training steps
    signal: Tensor  # (N + 1,) float64, from noise to image; ends with 1
    sigma: Tensor  # (N + 1,) float64; ends with 0

    def __len__(self) -> int:
        return self.times.shape[0]

    @property
    def initial_scale(self) -> float:
        """Deviation of the first x_t for data of unit variance, the scale of the initial noise."""
        return math.hypot(self.signal[0].item(), self.sigma[0].item())

    def last(self, steps: int) -> "Trajectory":
        """The trajectory of the last `steps` steps."""
        return Trajectory(self.times[-steps:], self.signal[-steps - 1 :], self.sigma[-steps - 1 :])

    def step(self, index: int) -> Step:
        """The step from level `index` to the next."""
        signal, next_signal = self.signal[index : index + 2].tolist()
        sigma, next_sigma = self.sigma[index : index + 2].tolist()
        return Step(signal, sigma, next_signal, next_sigma)


def spaced_timesteps(num_train_timesteps: int, num_inference_steps: int, *, spacing: Spacing = "linspace") -> list[int]:
    """Training steps to sample with, ascending (Lin et al., 2024, table 2).

    Args:
        spacing: "linspace" includes both ends: 250 of 1000 are 0, 4, 8, ... 995, 999; a single step is the last step,
            where alone sampling can start from noise. "leading" has a whole stride from 0, so that the last steps are
            never taken; "trailing" has an even stride down from the last step.

    Raises:
        ValueError: num_inference_steps is not in [1, num_train_timesteps].
    """
    if not 1 <= num_inference_steps <= num_train_timesteps:
        raise ValueError(f"num_inference_steps must be in [1, {num_train_timesteps}], not {num_inference_steps}")
    if spacing == "leading":
        return list(range(0, num_train_timesteps, num_train_timesteps // num_inference_steps))[:num_inference_steps]
    if spacing == "trailing":
        stride = num_train_timesteps / num_inference_steps
        return [round(num_train_timesteps - i * stride) - 1 for i in reversed(range(num_inference_steps))]
    if num_inference_steps == 1:
        return [num_train_timesteps - 1]
    stride = (num_train_timesteps - 1) / (num_inference_steps - 1)
    return [round(i * stride) for i in range(num_inference_steps)]


def karras_sigmas(num_inference_steps: int, *, sigma_min: float, sigma_max: float) -> Tensor:
    """Levels (N,) float64 from sigma_max down to sigma_min with rho = 7 (Karras et al., 2022, equation 5).

    Raises ValueError if num_inference_steps is below 1.
    """
    if num_inference_steps < 1:
        raise ValueError(f"num_inference_steps must be at least 1, not {num_inference_steps}")
    ramp = torch.linspace(0, 1, num_inference_steps, dtype=torch.float64)
    return (sigma_max ** (1 / 7) + ramp * (sigma_min ** (1 / 7) - sigma_max ** (1 / 7))) ** 7


def with_clean_end(times: Tensor, signal: Tensor, sigma: Tensor) -> Trajectory:
    """The trajectory through the given levels, each (N,), to the clean image."""
    return Trajectory(times, torch.cat([signal, signal.new_ones(1)]), torch.cat([sigma, sigma.new_zeros(1)]))
