"""What a network learns to undo: how noise is added, what it predicts, its loss, and the way back to x_0.

Three processes in one form, x_t = signal * x_0 + sigma * noise: discrete steps (here), EDM and rectified flow.
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

Network = Callable[..., Tensor]  # (x_t, what it is told about the time (B,), **conditions) -> output


class Objective(Protocol):
    """Of one trained network. The output has C channels, or 2 C where the variance is learned."""

    def times(self, uniform: Tensor) -> Tensor:
        """Numbers (B,) in [0, 1) as times (B,) of training."""

    def levels(self, time: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Factors signal and sigma of x_t at these times, each (B, 1, ...) with the dtype of `like`."""

    def add_noise(self, x_0: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        """x_t: signal * x_0 + sigma * noise."""

    def apply(self, network: Network, x_t: Tensor, time: Tensor, **conditions: Tensor) -> Tensor:
        """The network's output, its input scaled and its time told as this objective wants."""

    def loss(self, output: Tensor, *, x_0: Tensor, noise: Tensor, x_t: Tensor, time: Tensor) -> Tensor:
        """Weighted loss of each sample, (B,)."""

    def predict_x_0(self, output: Tensor, *, x_t: Tensor, time: Tensor) -> Tensor:
        """The clean image that an output implies; not clipped."""

    def log_variance(self, output: Tensor, *, like: Tensor, small: Tensor, large: Tensor) -> Tensor:
        """Log variance of an ancestral step, from those of the posterior (small) and of the forward step (large)."""

    def trajectory(self, num_inference_steps: int, *, spacing: Spacing = "linspace") -> Trajectory:
        """Levels to sample at; `spacing` chooses among training steps, and only discrete steps have a choice.

        Raises ValueError if num_inference_steps is out of range.
        """


def make_objective(settings: Mapping[str, Any]) -> Objective:
    """Build an objective from plain values, as a model bundle's `settings["objective"]` holds them.

    Args:
        settings: "kind" is "discrete", "edm" or "flow"; the others are arguments of `DiscreteObjective` (its loss_kind
            as "loss", and those of `make_schedule`, its name as "schedule"), `EDMObjective` or `FlowObjective`.

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
