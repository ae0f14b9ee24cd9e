"""Flow matching on straight paths: rectified flow.

Sources: Liu et al. (2023), Lipman et al. (2023), Esser et al. (2024).

x_t = (1 - t) * x_0 + t * noise. The time (B,) is t in [0, 1], 1 for noise; the network's time input is 1000 t, and the
prediction is the velocity noise - x_0.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from components.models.diffusion.schedule import expand
from components.models.diffusion.steps import Spacing
from components.models.diffusion.trajectory import Trajectory, with_clean_end


@dataclass(frozen=True)
class FlowObjective:
    """Objective of rectified flow with times t on the straight line from x_0 to noise.

    Args:
        time_density: "uniform", or "logit_normal" (standard; Esser et al., 2024, equation 19), with which training sees
            the middle of the line more often than the ends.
    """

    time_density: Literal["uniform", "logit_normal"] = "uniform"

    def times(self, uniform: Tensor) -> Tensor:
        if self.time_density == "uniform":
            return uniform
        return torch.special.ndtri(uniform.clamp(min=2**-25)).sigmoid()

    def levels(self, time: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        return expand(1 - time, like), expand(time, like)

    def add_noise(self, x_0: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        signal, sigma = self.levels(time, x_0)
        return signal * x_0 + sigma * noise

    def apply(self, network: Callable[..., Tensor], x_t: Tensor, time: Tensor, **conditions: Tensor) -> Tensor:
        return network(x_t, 1000 * time, **conditions)

    def loss(self, output: Tensor, *, x_0: Tensor, noise: Tensor, x_t: Tensor, time: Tensor) -> Tensor:
        errors = output.to(x_0.dtype) - (noise - x_0)
        return errors.square().mean(dim=tuple(range(1, x_0.ndim)))  # (B,)

    def predict_x_0(self, output: Tensor, *, x_t: Tensor, time: Tensor) -> Tensor:
        return x_t - expand(time, x_t) * output

    def log_variance(self, output: Tensor, *, like: Tensor, small: Tensor, large: Tensor) -> Tensor:
        return small

    def trajectory(self, num_inference_steps: int, *, spacing: Spacing = "linspace") -> Trajectory:
        """Even steps of t from 1 to 0. Raises ValueError if num_inference_steps is below 1."""
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps must be at least 1, not {num_inference_steps}")
        time = torch.linspace(1, 0, num_inference_steps + 1, dtype=torch.float64)[:-1]
        return with_clean_end(time, 1 - time, time)
