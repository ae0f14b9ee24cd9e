"""Training objectives: the noise added, the network's target, the loss, and the way back to x_0.

Three processes in the same form, x_t = signal * x_0 + sigma * noise: discrete steps, EDM (Karras et al., 2022) and
rectified flow (Liu et al., 2023; Lipman et al., 2023; Esser et al., 2024). Everywhere x_0, noise and x_t are (B, C, H,
W) of one shape and time is (B,), in the objective's own unit."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from components.models.diffusion.discrete import DiscreteObjective
from components.models.diffusion.schedule import Trajectory, expand, karras_sigmas, make_schedule, with_clean_end
from components.models.diffusion.steps import Spaced

Network = Callable[..., Tensor]  # (x_t, an encoding of the time (B,), **conditions) -> output


class Objective(Protocol):
    """Formulas of a training objective; outputs have C channels, or 2 C with a learned variance."""

    def times(self, uniform: Tensor) -> Tensor:
        """Training times (B,) for uniform numbers (B,) in [0, 1)."""

    def levels(self, time: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Factors signal and sigma of x_t at the times, each (B, 1, ...) with the dtype of `like`."""

    def add_noise(self, x_0: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        """x_t: signal * x_0 + sigma * noise."""
        signal, sigma = self.levels(time, x_0)
        return signal * x_0 + sigma * noise

    def apply(self, network: Network, x_t: Tensor, time: Tensor, **conditions: Tensor) -> Tensor:
        """The network's output, with input and time scaled for the objective."""

    def loss(self, output: Tensor, *, x_0: Tensor, noise: Tensor, x_t: Tensor, time: Tensor) -> Tensor:
        """Weighted loss of each sample, (B,)."""

    def predict_x_0(self, output: Tensor, *, x_t: Tensor, time: Tensor) -> Tensor:
        """The clean image that follows from an output; not clipped."""

    def log_variance(self, output: Tensor, *, like: Tensor, small: Tensor, large: Tensor) -> Tensor:
        """Log variance of an ancestral step, from the posterior's (small) and the forward step's (large)."""
        return small

    def trajectory(self, num_inference_steps: int, *, spacing: Spaced = "linspace") -> Trajectory:
        """The levels of sampling; `spacing` chooses among training steps, a choice of discrete steps only.
        Raises ValueError if num_inference_steps is out of range."""


class Preconditioning(NamedTuple):
    """Factors of table 1, each (B, 1, ...): D(x_t) = c_skip * x_t + c_out * network(c_in * x_t, time)."""

    c_skip: Tensor
    c_out: Tensor
    c_in: Tensor


@dataclass(frozen=True)
class EDMObjective(Objective):
    """EDM: a network with preconditioned input and output, for all noise levels (Karras et al., 2022).
    x_t = x_0 + sigma * noise. The time (B,) is sigma; the network's time input is log(sigma) / 4. Input and target of
    the network have unit variance at every sigma, where the data have deviation sigma_data (table 1).

    `sigma_data` is the deviation of the data, over all images and pixels; `log_mean` and `log_std` are of log sigma in
    training, P_mean and P_std; `sigma_max` is the first level of sampling, `sigma_min` the last before the
    clean image."""

    sigma_data: float = 0.5
    log_mean: float = -1.2
    log_std: float = 1.2
    sigma_min: float = 0.002
    sigma_max: float = 80.0

    def times(self, uniform: Tensor) -> Tensor:
        """Log-normal sigmas by the inverse distribution function; a draw of 0 counts as 2^-25.
        That is half of the least number of float32 draws; the inverse of 0 itself would be infinite."""
        return (self.log_mean + self.log_std * torch.special.ndtri(uniform.clamp(min=2**-25))).exp()

    def levels(self, time: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        sigma = expand(time, like)
        return torch.ones_like(sigma), sigma

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

    def trajectory(self, num_inference_steps: int, *, spacing: Spaced = "linspace") -> Trajectory:
        sigma = karras_sigmas(num_inference_steps, sigma_min=self.sigma_min, sigma_max=self.sigma_max)
        return with_clean_end(sigma, torch.ones_like(sigma), sigma)


@dataclass(frozen=True)
class FlowObjective(Objective):
    """Flow matching on straight paths, x_t = (1 - t) * x_0 + t * noise: rectified flow.
    The time (B,) is t in [0, 1], 1 for noise; the network's time input is 1000 t, and the prediction is the velocity
    noise - x_0.

    The `time_density` "logit_normal" (standard; Esser et al., 2024, equation 19) lets training see the middle of the
    line more often than the ends."""

    time_density: Literal["uniform", "logit_normal"] = "uniform"

    def times(self, uniform: Tensor) -> Tensor:
        if self.time_density == "uniform":
            return uniform
        return torch.special.ndtri(uniform.clamp(min=2**-25)).sigmoid()

    def levels(self, time: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        return expand(1 - time, like), expand(time, like)

    def apply(self, network: Callable[..., Tensor], x_t: Tensor, time: Tensor, **conditions: Tensor) -> Tensor:
        return network(x_t, 1000 * time, **conditions)

    def loss(self, output: Tensor, *, x_0: Tensor, noise: Tensor, x_t: Tensor, time: Tensor) -> Tensor:
        errors = output.to(x_0.dtype) - (noise - x_0)
        return errors.square().mean(dim=tuple(range(1, x_0.ndim)))  # (B,)

    def predict_x_0(self, output: Tensor, *, x_t: Tensor, time: Tensor) -> Tensor:
        return x_t - expand(time, x_t) * output

    def trajectory(self, num_inference_steps: int, *, spacing: Spaced = "linspace") -> Trajectory:
        """Even steps of t from 1 to 0. Raises ValueError if num_inference_steps is below 1."""
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps must be at least 1, not {num_inference_steps}")
        time = torch.linspace(1, 0, num_inference_steps + 1, dtype=torch.float64)[:-1]
        return with_clean_end(time, 1 - time, time)


def make_objective(settings: Mapping[str, Any]) -> Objective:
    """Build an objective from the plain values of a model bundle's `settings["objective"]`.
    "kind" is "discrete", "edm" or "flow"; all further keys are arguments of `DiscreteObjective` (loss_kind under the
    key "loss", and those of `make_schedule`, the name under "schedule"), `EDMObjective` or `FlowObjective`. Raises
    ValueError for an unknown kind, or settings that do not go together."""
    values = dict(settings)
    kind = values.pop("kind")
    if kind == "edm":
        return EDMObjective(**values)
    if kind == "flow":
        return FlowObjective(**values)
    if kind != "discrete":
        raise ValueError(f"unknown objective {kind!r}: choose discrete, edm or flow")
    options = ("num_train_timesteps", "beta_start", "beta_end", "zero_terminal_snr")
    schedule = make_schedule(values.pop("schedule"), **{name: values.pop(name) for name in options if name in values})
    return DiscreteObjective(schedule, loss_kind=values.pop("loss", "simple"), **values)
