"""The samplers, a class each with a step from x_t to the next, cleaner level, and a table.

A new sampler is a class, a name in `SamplerName` and a row in `SAMPLERS`; the command, the HTTP API, the page and the
recipes read the samplers here. Nothing is imported from torch, so that `cascade --help` needs no torch: the formulas
are arithmetic on tensors (B, ...). The formulas hold for any process with x_t = signal * x_0 + sigma * noise; the
numbers of a `Step` are float64, and x_0 is the image that the network sees in x_t."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

if TYPE_CHECKING:
    from torch import Tensor

SamplerName = Literal["ddpm", "ddim", "dpm_solver_pp", "sde_dpm_solver_pp", "heun", "euler"]
Spacing = Literal["linspace", "leading", "leading_from_1", "trailing", "karras"]
Spaced = str | tuple[int, ...]  # a `Spacing`, counts as "10,10,3,2,2", or training steps


class Step(NamedTuple):
    """Two neighboring noise levels, from the noisier to the cleaner."""

    signal: float
    sigma: float
    next_signal: float
    next_sigma: float

    @property
    def added_variance(self) -> float:
        """Variance added by noising from the next level to the current level: beta for adjacent steps."""
        return self.sigma**2 - (self.signal / self.next_signal * self.next_sigma) ** 2

    @property
    def posterior_variance(self) -> float:
        """Variance of q(x_next | x_t, x_0), Ho et al. (2020), equation 7; 0 in the last step."""
        return self.added_variance * (self.next_sigma / self.sigma) ** 2

    @property
    def log_snr_gain(self) -> float:
        """Growth of log(signal / sigma), h of Lu et al. (2022); infinite from noise or to a clean image."""
        before, after = self.signal * self.next_sigma, self.next_signal * self.sigma
        return math.inf if before == 0 else math.log(after / before)


class Prediction(NamedTuple):
    """The current x_t with the network's prediction at a level, and the noise and gradient of the step."""

    step: Step
    x_t: Tensor
    x_0: Tensor  # thresholded; moved by the gradient, except for DDPM, where the mean moves
    output: Tensor  # of the network
    gradient: Tensor | None  # of a score's log probability at x_t
    noise: Tensor | None  # standard normal; None where the step adds none


class Euler:
    """Euler's method on the probability flow (Karras et al., 2022): DDIM without noise, at any levels."""

    title = "Euler"
    spacing: Spacing = "karras"  # default for a discrete objective's steps: accurate enough at few steps
    own_eta: float | None = 0.0  # share of DDPM's noise that a step adds; None: the request's eta
    shifts_x_0 = True  # a score moves the image (Dhariwal and Nichol, 2021, algorithm 2)

    def __init__(self, log_variance: Callable[..., Tensor], *, eta: float, scaled: bool) -> None:
        """Prepare a trajectory with the objective's `log_variance` and the request's eta in [0, 1].
        `scaled`: every level has some of the image's signal."""
        self.log_variance, self.scaled = log_variance, scaled
        self.eta = eta if self.own_eta is None else self.own_eta
        self.draws = self.eta > 0  # noise in every step but the last

    def step(self, prediction: Prediction, look: Callable[[Tensor], Tensor]) -> Tensor:
        """The next x; `look` predicts x_0 from an x at the next level, by a further run of the network."""
        del look
        return ddim_step(prediction.step, x_t=prediction.x_t, x_0=prediction.x_0, noise=prediction.noise, eta=self.eta)


class DDIM(Euler):
    """Denoising diffusion implicit models (Song et al., 2021)."""

    title = "DDIM"
    spacing: Spacing = "linspace"
    own_eta = None


class DDPM(Euler):
    """Ancestral sampling with the objective's variance (Ho et al., 2020, algorithm 2)."""

    title = "DDPM"
    spacing: Spacing = "linspace"
    own_eta = 1.0
    shifts_x_0 = False
    before: Step | None = None

    def step(self, prediction: Prediction, look: Callable[[Tensor], Tensor]) -> Tensor:
        """The mean of the posterior plus deviation * noise.
        A score moves the mean by variance * gradient (Dhariwal and Nichol, 2021, algorithm 1). The posterior variance
        of the last step is zero; as in `Schedule`, the step before supplies the value."""
        del look
        step, x_t = prediction.step, prediction.x_t
        mean = ddpm_step(step, x_t=x_t, x_0=prediction.x_0)
        source = step if step.next_sigma > 0 else self.before
        large = math.log(step.added_variance)
        small = math.log(source.posterior_variance) if source else large
        both = {"small": x_t.new_tensor(small), "large": x_t.new_tensor(large)}
        log_variance = self.log_variance(prediction.output, like=x_t, **both)
        if prediction.gradient is not None:
            mean = mean + log_variance.exp() * prediction.gradient
        self.before = step
        return mean if prediction.noise is None else mean + (0.5 * log_variance).exp() * prediction.noise


class DPMSolver(Euler):
    """DPM-Solver++(2M) (Lu et al., 2022, algorithm 2)."""

    title = "DPM-Solver++"
    before: Prediction | None = None

    def step(self, prediction: Prediction, look: Callable[[Tensor], Tensor]) -> Tensor:
        """DDIM's step to an x_0 extrapolated from the current and the previous prediction.
        In the last step, where the extrapolation would be infinite, x_0 is its own: a step of order 1, as at first."""
        before, self.before = self.before, prediction
        gain = prediction.step.log_snr_gain
        if before is not None and not math.isinf(gain):
            x_0 = prediction.x_0 + gain / (2 * before.step.log_snr_gain) * (prediction.x_0 - before.x_0)
            prediction = prediction._replace(x_0=x_0)
        return super().step(prediction, look)


class SDEDPMSolver(DPMSolver):
    """SDE-DPM-Solver++(2M) (Lu et al., 2022), with the full noise of DDPM in every step."""

    title = "SDE-DPM-Solver++"
    own_eta = 1.0


class Heun(Euler):
    """Heun's method (Karras et al., 2022, algorithm 1): two runs of the network a step, but the last."""

    title = "Heun"

    def step(self, prediction: Prediction, look: Callable[[Tensor], Tensor]) -> Tensor:
        """Euler's step, corrected by the prediction at the end of the step (lines 7 and 8).
        Solved for x_t / signal as a function of sigma / signal, as Karras et al. do; for a process with no signal at
        the start along the straight line between the two levels."""
        step, x_t, x_0 = prediction.step, prediction.x_t, prediction.x_0
        x_next = super().step(prediction, look)
        if step.next_sigma == 0:
            return x_next
        x_0_next = look(x_next)
        noise_next = (x_next - step.next_signal * x_0_next) / step.next_sigma
        noise = ((x_t - step.signal * x_0) / step.sigma + noise_next) / 2
        if self.scaled:
            ratio = step.next_signal / step.signal
            return ratio * x_t + (step.next_sigma - ratio * step.sigma) * noise
        x_0_mean = (x_0 + x_0_next) / 2
        return x_t + (step.next_signal - step.signal) * x_0_mean + (step.next_sigma - step.sigma) * noise


SAMPLERS: dict[SamplerName, type[Euler]] = {
    "ddpm": DDPM,
    "ddim": DDIM,
    "dpm_solver_pp": DPMSolver,
    "sde_dpm_solver_pp": SDEDPMSolver,
    "heun": Heun,
    "euler": Euler,
}


def check_spacing(spacing: Spaced, num_inference_steps: int) -> None:
    """Raise ValueError, in one line, for an unknown spacing, or for one of another number of steps."""
    if spacing in get_args(Spacing):
        return
    if isinstance(spacing, str) and not all(part.isdecimal() for part in spacing.split(",")):
        names = ", ".join(get_args(Spacing))
        raise ValueError(f"unknown spacing {spacing!r}: choose {names}, counts as 10,10,3,2,2, or a list of steps")
    count = sum(map(int, spacing.split(","))) if isinstance(spacing, str) else len(spacing)
    if not isinstance(spacing, str) and len({*spacing}) < count:
        raise ValueError(f"spacing {[*spacing]} names a step twice")
    if count != num_inference_steps:
        shown = spacing if isinstance(spacing, str) else [*spacing]
        raise ValueError(f"spacing {shown} has {count} steps, num_inference_steps is {num_inference_steps}")


def spaced_timesteps(num_train_timesteps: int, num_inference_steps: int, *, spacing: Spaced = "linspace") -> list[int]:
    """Training steps to sample with, ascending (Lin et al., 2024, table 2).

    Args:
        spacing: "linspace" has both ends: 250 of 1000 are 0, 4, 8, ... 995, 999; a single step is the last step, where
            alone noise is. "leading" has a whole stride from 0, so that the last steps are never taken,
            "leading_from_1" the same a step later (Rombach et al., 2022); "trailing" an even stride down from the last.
            Counts are of equal sections (Nichol and Dhariwal, 2021); a tuple holds the steps.

    Raises ValueError if num_inference_steps is not in [1, num_train_timesteps], or the spacing does not fit it."""
    if not 1 <= num_inference_steps <= num_train_timesteps:
        raise ValueError(f"num_inference_steps must be in [1, {num_train_timesteps}], not {num_inference_steps}")
    check_spacing(spacing, num_inference_steps)
    if not isinstance(spacing, str):
        steps = sorted(spacing)
        last = num_train_timesteps - 1
        if steps[0] < 0 or steps[-1] > last:
            raise ValueError(f"spacing must hold steps in [0, {last}], not {steps[0]} to {steps[-1]}")
        return steps
    if spacing[0].isdecimal():
        return _sections(num_train_timesteps, [int(part) for part in spacing.split(",")])
    if spacing.startswith("leading"):
        first, stride = int(spacing == "leading_from_1"), num_train_timesteps // num_inference_steps
        if first + (num_inference_steps - 1) * stride >= num_train_timesteps:
            raise ValueError(f"spacing {spacing} takes fewer than all {num_train_timesteps} steps of training")
        return [first + i * stride for i in range(num_inference_steps)]
    if spacing == "trailing":
        stride = num_train_timesteps / num_inference_steps
        return [round(num_train_timesteps - i * stride) - 1 for i in reversed(range(num_inference_steps))]
    if num_inference_steps == 1:
        return [num_train_timesteps - 1]
    stride = (num_train_timesteps - 1) / (num_inference_steps - 1)
    return [round(i * stride) for i in range(num_inference_steps)]


def _sections(num_train_timesteps: int, counts: list[int]) -> list[int]:
    """Steps of equal sections; the first are longer by a rest. Places are sums of the stride, as OpenAI's."""
    size, longer = divmod(num_train_timesteps, len(counts))
    steps, start = list[int](), 0
    for index, count in enumerate(counts):
        length = size + (index < longer)
        if not 1 <= count <= length:
            raise ValueError(f"spacing has a section of {length} training steps, which can't be {count} steps")
        place, stride = 0.0, (length - 1) / max(1, count - 1)
        for _ in range(count):
            steps.append(start + round(place))
            place += stride
        start += length
    return steps


def ddpm_step(step: Step, *, x_t: Tensor, x_0: Tensor) -> Tensor:
    """Mean of q(x_next | x_t, x_0), Ho et al. (2020), equation 7; the caller adds deviation * noise."""
    coef_x_0 = step.next_signal * step.added_variance / step.sigma**2
    coef_x_t = step.signal / step.next_signal * (step.next_sigma / step.sigma) ** 2
    return coef_x_0 * x_0 + coef_x_t * x_t


def ddim_step(step: Step, *, x_t: Tensor, x_0: Tensor, noise: Tensor | None = None, eta: float = 0.0) -> Tensor:
    """Step of DDIM, Song et al. (2021), equation 12, with the noise derived again from the (clipped) x_0.
    Eta 1 is DDPM; at eta 0 this is also Euler's step of the probability flow, and DPM-Solver++ of order 1."""
    variance = eta**2 * step.posterior_variance  # equation 16
    epsilon = (x_t - step.signal * x_0) / step.sigma
    mean = step.next_signal * x_0 + math.sqrt(max(step.next_sigma**2 - variance, 0)) * epsilon
    return mean if noise is None else mean + math.sqrt(variance) * noise
