"""EDM: a network with preconditioned input and output, for all noise levels (Karras et al., 2022).

x_t = x_0 + sigma * noise. The time (B,) is sigma; the network's time input is log(sigma) / 4. Input and target of the
network have unit variance at every sigma, where the data have deviation sigma_data (table 1).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from components.models.diffusion.schedule import expand
from components.models.diffusion.steps import Spacing
from components.models.diffusion.trajectory import Trajectory, karras_sigmas, with_clean_end


class Preconditioning(NamedTuple):
    """Factors of table 1, each (B, 1, ...): D(x_t) = c_skip * x_t + c_out * network(c_in * x_t, time)."""

    c_skip: Tensor
    c_out: Tensor
    c_in: Tensor


@dataclass(frozen=True)
class EDMObjective:
    """Objective of EDM with sigmas for times (Karras et al., 2022).

    Args:
        sigma_data: deviation of the data, over all images and pixels.
        log_mean, log_std: of log sigma in training, P_mean and P_std.
        sigma_min, sigma_max: the last level of sampling before the clean image, and the first level.
    """

    sigma_data: float = 0.5
    log_mean: float = -1.2
    log_std: float = 1.2
    sigma_min: float = 0.002
    sigma_max: float = 80.0

    def times(self, uniform: Tensor) -> Tensor:
        """Log-normal sigmas by the inverse distribution function; a draw of 0 counts as 2^-25.

        2^-25 is half of the least of the 2^24 numbers that float32 draws have: the inverse of 0 itself would be
        infinite.
        """
        return (self.log_mean + self.log_std * torch.special.ndtri(uniform.clamp(min=2**-25))).exp()

    def levels(self, time: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        sigma = expand(time, like)
        return torch.ones_like(sigma), sigma

    def add_noise(self, x_0: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        return x_0 + expand(time, x_0) * noise

    def preconditioning(self, time: Tensor, like: Tensor) -> Preconditioning:  # each (B, 1, ...)
        sigma = expand(time, like)
        total = sigma**2 + self.sigma_data**2
        return Preconditioning(self.sigma_data**2 / total, sigma * self.sigma_data * total.rsqrt(), total.rsqrt())

    def apply(self, network: Callable[..., Tensor], x_t: Tensor, time: Tensor, **conditions: Tensor) -> Tensor:
        return network(self.preconditioning(time, x_t).c_in * x_t, time.log() / 4, **conditions)

    def loss_weight(self, time: Tensor) -> Tensor:
        """Weight (B,) of the squared error of x_0: 1 / c_out^2, equal for every sigma at the start."""
        return (time**2 + self.sigma_data**2) / (time * self.sigma_data) ** 2

    def loss(self, output: Tensor, *, x_0: Tensor, noise: Tensor, x_t: Tensor, time: Tensor) -> Tensor:
        errors = self.predict_x_0(output.to(x_0.dtype), x_t=x_t, time=time) - x_0
        return self.loss_weight(time) * errors.square().mean(dim=tuple(range(1, x_0.ndim)))  # (B,)

    def predict_x_0(self, output: Tensor, *, x_t: Tensor, time: Tensor) -> Tensor:
        """The denoised image: D of equation 7, c_skip * x_t + c_out * output."""
        factors = self.preconditioning(time, x_t)
        return factors.c_skip * x_t + factors.c_out * output

    def log_variance(self, output: Tensor, *, like: Tensor, small: Tensor, large: Tensor) -> Tensor:
        return small

    def trajectory(self, num_inference_steps: int, *, spacing: Spacing = "linspace") -> Trajectory:
        sigma = karras_sigmas(num_inference_steps, sigma_min=self.sigma_min, sigma_max=self.sigma_max)
        return with_clean_end(sigma, torch.ones_like(sigma), sigma)
