"""The noise schedules and the table of schedules: betas, the variance added by each step.

A new schedule is a function, a name in `ScheduleName` and a row in `SCHEDULES`; configuration, `make_schedule` and the
study of noising read the schedules here. torch is imported where betas are made, so that `cascade --help` needs no
torch. Shapes: T num_train_timesteps; betas are (T,) float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

ScheduleName = Literal["linear", "scaled_linear", "cosine"]
Ends = tuple[float, float]  # first and last beta


class NoiseSchedule(NamedTuple):
    """A row of `SCHEDULES`: a function from steps and ends to betas, and the default ends."""

    betas: Callable[[int, Ends], Tensor]  # (T, ends) -> betas
    ends: Ends | None  # default first and last beta at T = 1,000; None: the schedule takes no ends

    @property
    def too_few_steps(self) -> float:
        """The T where the last beta of the default ends reaches 1; 0 for a schedule without ends."""
        return 1000 * self.ends[1] if self.ends else 0.0


def linear(num_train_timesteps: int, ends: Ends) -> Tensor:
    """Betas of DDPM, linear in the step (Ho et al., 2020)."""
    import torch

    return torch.linspace(*ends, num_train_timesteps, dtype=torch.float64)


def scaled_linear(num_train_timesteps: int, ends: Ends) -> Tensor:
    """Betas with square roots linear in the step (Rombach et al., 2022, under the name "linear")."""
    import torch

    first, last = (max(end, 0) ** 0.5 for end in ends)
    return torch.linspace(first, last, num_train_timesteps, dtype=torch.float64) ** 2


def cosine(num_train_timesteps: int, ends: Ends) -> Tensor:
    """Betas of alphas_cumprod = cos² (Nichol and Dhariwal, 2021, equation 17); `ends` is not used."""
    import torch

    del ends
    time = torch.arange(num_train_timesteps + 1, dtype=torch.float64) / num_train_timesteps
    alphas_cumprod = ((time + 0.008) / 1.008 * math.pi / 2).cos() ** 2  # its value at 0 cancels in the ratio
    return (1 - alphas_cumprod[1:] / alphas_cumprod[:-1]).clamp(max=0.999)


SCHEDULES: dict[ScheduleName, NoiseSchedule] = {
    "linear": NoiseSchedule(linear, (1e-4, 2e-2)),
    "scaled_linear": NoiseSchedule(scaled_linear, (0.00085, 0.012)),
    "cosine": NoiseSchedule(cosine, None),
}


def check_ends(name: ScheduleName, beta_start: float | None, beta_end: float | None) -> None:
    """Raise ValueError, in a single line, for an unknown schedule or for wrong ends.
    Wrong ends are a beta_start without beta_end, the reverse, or ends for a schedule without ends."""
    if name not in SCHEDULES:
        *names, last = SCHEDULES
        raise ValueError(f"unknown schedule {name!r}: choose {', '.join(names)} or {last}")
    if (beta_start is None) != (beta_end is None):
        raise ValueError("give both beta_start and beta_end, or neither")
    if SCHEDULES[name].ends is None and beta_start is not None:
        raise ValueError(f"schedule {name} takes no beta_start and no beta_end")
