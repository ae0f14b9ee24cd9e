"""Tables of a noise schedule, closed forms of the forward process, and the levels of a sampler.

Sources: Ho et al. (2020); Nichol and Dhariwal (2021); Lin et al. (2024); Karras et al. (2022). Tables are float64;
`timesteps` are 0-based: index 0 has seen one noising step. At a level of any process of training x_t = signal * x_0 +
sigma * noise. Shapes: B batch, T num_train_timesteps, N num_inference_steps."""

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from components.models.devices import to_device
from components.models.diffusion.betas import SCHEDULES, ScheduleName, check_ends
from components.models.diffusion.steps import Step


@dataclass(frozen=True, eq=False)
class Schedule:
    """Tables of a forward process.

    `betas` are (T,) float64 in (0, 1), the variance of the noise added at each step; the last may be 1 (zero terminal
    SNR). Others raise ValueError."""

    betas: Tensor
    kept: dict[tuple[str, torch.device], Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        _check_betas(self.betas[:-1] if self.betas[-1] == 1 else self.betas)

    def __len__(self) -> int:
        return self.betas.shape[0]

    @property
    def alphas_cumprod(self) -> Tensor:  # (T,)
        return self.tables["alphas_cumprod"]

    @cached_property
    def tables(self) -> dict[str, Tensor]:
        """Tables (T,) by name; `posterior` is that of x_{t-1}, Ho et al. (2020), equation 7.
        Two logarithms are clipped: that of the posterior variance, which is 0 at index 0, holds there the value of
        index 1, for a floor of 1e-20 would ruin likelihoods; so does that of beta (code of Improved DDPM)."""
        with torch.inference_mode(mode=False):  # training may use tables made while sampling
            betas = self.betas
            alphas_cumprod = (1 - betas).cumprod(0)
            before = torch.cat([betas.new_ones(1), alphas_cumprod[:-1]])  # no noise at first
            noise = 1 - alphas_cumprod
            posterior_variance = betas * (1 - before) / noise
            clipped = torch.cat([posterior_variance[1:2] if len(self) > 1 else betas, posterior_variance[1:]]).log()
            return {
                "alphas_cumprod": alphas_cumprod,
                "alphas_cumprod_prev": before,
                "signal": alphas_cumprod.sqrt(),
                "sigma": noise.sqrt(),
                "signal_before": before.sqrt(),
                "sigma_before": (1 - before).sqrt(),
                "signal_to_noise": alphas_cumprod / noise,
                "noise_levels": (noise / alphas_cumprod).sqrt(),  # sigma / signal
                "log_noise_levels": (noise / alphas_cumprod).sqrt().log(),
                "log_sigma_squared": noise.log(),
                "posterior_of_x_0": betas * before.sqrt() / noise,  # weight in the mean
                "posterior_of_x_t": (1 - before) * (1 - betas).sqrt() / noise,
                "posterior_variance": posterior_variance,
                "posterior_log_variance_clipped": clipped,
                "log_betas": betas.log(),
                "log_betas_clipped": torch.cat([clipped[:1], betas.log()[1:]]),
            }

    def table(self, name: str, device: torch.device) -> Tensor:
        """The named table (T,) on `device`, copied there once, since each copy makes the host wait."""
        if (name, device) not in self.kept:
            with torch.inference_mode(mode=False):
                self.kept[name, device] = to_device(self.tables[name], device)
        return self.kept[name, device]

    def at(self, name: str, timesteps: Tensor, like: Tensor) -> Tensor:
        """The named table at timesteps (B,) as (B, 1, ...), cast last to lose no precision before."""
        return expand(self.table(name, timesteps.device)[timesteps], like)

    def add_noise(self, x_0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Draw x_t from q(x_t | x_0), Ho et al. (2020), equation 4; x_0, noise (B, ...), timesteps (B,)."""
        signal, sigma = self.signal_and_noise(timesteps, x_0)
        return signal * x_0 + sigma * noise

    def signal_and_noise(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Factors sqrt(alphas_cumprod) and sqrt(1 - alphas_cumprod), (B, 1, ...) in the dtype of `like`."""
        return self.at("signal", timesteps, like), self.at("sigma", timesteps, like)

    def posterior(self, x_0: Tensor, x_t: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """The Gaussian q(x_{t-1} | x_t, x_0), Ho et al. (2020), equations 6 and 7, at timesteps (B,) int64.
        Returns the mean (B, ...) and the log variance (B, 1, ...), clipped: index 0 holds the value of index 1."""
        mean = self.at("posterior_of_x_0", timesteps, x_t) * x_0 + self.at("posterior_of_x_t", timesteps, x_t) * x_t
        return mean, self.at("posterior_log_variance_clipped", timesteps, x_t)


def expand(values: Tensor, like: Tensor) -> Tensor:
    """Values (B,) as (B, 1, ...) with the dtype of `like`."""
    return values.to(like.dtype).reshape(-1, *[1] * (like.ndim - 1))


def make_schedule(
    name: ScheduleName,
    *,
    num_train_timesteps: int,
    beta_start: float | None = None,
    beta_end: float | None = None,
    zero_terminal_snr: bool = False,
) -> Schedule:
    """Build a schedule from a name, a number of steps and, where the schedule takes ends, two betas.

    Args:
        name: a row of `SCHEDULES`.
        num_train_timesteps: T, at least 1; "linear" needs at least 21, since with fewer steps a beta reaches 1.
        beta_start, beta_end: first and last beta of schedules that have ends, used unscaled: SR3 and Palette have 1e-6
            and 1e-2. The defaults are the ends of the table, times 1000 / T.
        zero_terminal_snr: rescale so that the last step leaves no signal; not for networks that predict the noise.

    Raises ValueError for an unknown name, or a schedule that does not exist."""
    if num_train_timesteps < 1:
        raise ValueError(f"num_train_timesteps must be at least 1, not {num_train_timesteps}")
    check_ends(name, beta_start, beta_end)
    kind, scale = SCHEDULES[name], 1000 / num_train_timesteps
    first, last = kind.ends or (0.0, 0.0)
    betas = kind.betas(num_train_timesteps, (beta_start or scale * first, beta_end or scale * last))
    _check_betas(betas)
    return Schedule(without_terminal_signal(betas) if zero_terminal_snr else betas)


def _check_betas(betas: Tensor) -> None:
    if not bool(((betas > 0) & (betas < 1)).all()):
        low, high = betas.min().item(), betas.max().item()
        raise ValueError(
            f"impossible noise schedule: betas must lie inside (0, 1), but its {len(betas)} steps span {low:.3g} to "
            f"{high:.3g}; use more num_train_timesteps (linear needs at least 21)"
        )


def without_terminal_signal(betas: Tensor) -> Tensor:
    """Betas (T,) rescaled to zero terminal SNR, the first unchanged (Lin et al., 2024, algorithm 1).
    Raises ValueError for a single step, which cannot be first and last."""
    if len(betas) < 2:
        raise ValueError("zero terminal SNR needs num_train_timesteps of at least 2")
    signal = (1 - betas).cumprod(0).sqrt()
    signal = (signal - signal[-1]) * signal[0] / (signal[0] - signal[-1])
    alphas_cumprod = signal**2
    return 1 - alphas_cumprod / torch.cat([alphas_cumprod.new_ones(1), alphas_cumprod[:-1]])


class Trajectory(NamedTuple):
    """Levels from noise to image, and the time of each run of the network."""

    times: Tensor  # (N,), or (N + 1,) where the last level has one; int64: training steps
    signal: Tensor  # (N + 1,) float64, from noise to image; ends with 1, or training's first
    sigma: Tensor  # (N + 1,) float64; ends with 0, or likewise

    def __len__(self) -> int:
        return self.signal.shape[0] - 1

    @property
    def initial_scale(self) -> float:
        """Deviation of the first x_t for data of unit variance, the scale of the initial noise."""
        return math.hypot(self.signal[0].item(), self.sigma[0].item())

    def last(self, steps: int) -> "Trajectory":
        """The trajectory of the last `steps` steps."""
        first = len(self) - steps
        return Trajectory(self.times[first:], self.signal[first:], self.sigma[first:])

    def step(self, index: int) -> Step:
        """The step from level `index` to the next."""
        signal, next_signal = self.signal[index : index + 2].tolist()
        sigma, next_sigma = self.sigma[index : index + 2].tolist()
        return Step(signal, sigma, next_signal, next_sigma)


def karras_sigmas(num_inference_steps: int, *, sigma_min: float, sigma_max: float) -> Tensor:
    """Levels (N,) float64 from sigma_max down to sigma_min with rho = 7 (Karras et al., 2022, equation 5).
    Raises ValueError if num_inference_steps is below 1."""
    if num_inference_steps < 1:
        raise ValueError(f"num_inference_steps must be at least 1, not {num_inference_steps}")
    ramp = torch.linspace(0, 1, num_inference_steps, dtype=torch.float64)
    return (sigma_max ** (1 / 7) + ramp * (sigma_min ** (1 / 7) - sigma_max ** (1 / 7))) ** 7


def with_clean_end(times: Tensor, signal: Tensor, sigma: Tensor) -> Trajectory:
    """The trajectory through the given levels, each (N,), to the clean image."""
    return Trajectory(times, torch.cat([signal, signal.new_ones(1)]), torch.cat([sigma, sigma.new_zeros(1)]))
