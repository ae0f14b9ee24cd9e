"""Training objectives: the noise added, the network's target, the loss, and the way back to x_0.

Three processes in the same form, x_t = signal * x_0 + sigma * noise: discrete steps, EDM and rectified flow.
Everywhere x_0, noise and x_t are (B, C, H, W) of one shape and time is (B,), in the objective's own unit.
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from torch import Tensor

from components.models.diffusion.discrete import DiscreteObjective
from components.models.diffusion.edm import EDMObjective
from components.models.diffusion.flow import FlowObjective
from components.models.diffusion.schedule import make_schedule
from components.models.diffusion.steps import Spacing
from components.models.diffusion.trajectory import Trajectory

Network = Callable[..., Tensor]  # (x_t, an encoding of the time (B,), **conditions) -> output


class Objective(Protocol):
    """Formulas of a training objective; outputs have C channels, or 2 C with a learned variance."""

    def times(self, uniform: Tensor) -> Tensor:
        """Training times (B,) for uniform numbers (B,) in [0, 1)."""

    def levels(self, time: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Factors signal and sigma of x_t at the times, each (B, 1, ...) with the dtype of `like`."""

    def add_noise(self, x_0: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        """x_t: signal * x_0 + sigma * noise."""

    def apply(self, network: Network, x_t: Tensor, time: Tensor, **conditions: Tensor) -> Tensor:
        """The network's output, with input and time scaled for the objective."""

    def loss(self, output: Tensor, *, x_0: Tensor, noise: Tensor, x_t: Tensor, time: Tensor) -> Tensor:
        """Weighted loss of each sample, (B,)."""

    def predict_x_0(self, output: Tensor, *, x_t: Tensor, time: Tensor) -> Tensor:
        """The clean image that follows from an output; not clipped."""

    def log_variance(self, output: Tensor, *, like: Tensor, small: Tensor, large: Tensor) -> Tensor:
        """Log variance of an ancestral step, from the posterior's (small) and the forward step's (large)."""

    def trajectory(self, num_inference_steps: int, *, spacing: Spacing = "linspace") -> Trajectory:
        """The levels of sampling; `spacing` chooses among training steps, a choice of discrete steps only.

        Raises ValueError if num_inference_steps is out of range.
        """


def make_objective(settings: Mapping[str, Any]) -> Objective:
    """Build an objective from the plain values of a model bundle's `settings["objective"]`.

    Args:
        settings: "kind" is "discrete", "edm" or "flow"; all further keys are arguments of `DiscreteObjective`
            (loss_kind under the key "loss", and those of `make_schedule`, the name under "schedule"), `EDMObjective` or
            `FlowObjective`.

    Raises:
        ValueError: an unknown kind, or settings that do not go together.
    """
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
