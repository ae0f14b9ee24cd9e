"""The samplers, a class each with a step from x_t to the next, cleaner level, and a table.

A new sampler is a class, a name in `SamplerName` and a row in `SAMPLERS`; the command, the HTTP API, the page and the
recipes read the samplers here. Nothing is imported from torch, so that `cascade --help` needs no torch: the formulas
are arithmetic on tensors (B, ...). The formulas hold for any process with x_t = signal * x_0 + sigma * noise; the
numbers of a `Step` are float64, and x_0 is the image that the network sees in x_t.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

SamplerName = Literal["ddpm", "ddim", "dpm_solver_pp", "sde_dpm_solver_pp", "heun", "euler"]
Spacing = Literal["linspace", "leading", "trailing", "karras"]


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
        """Growth of log(signal / sigma), h of Lu et al. (2022).

        Infinite from pure noise or to a clean image.
        """
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
    shifts_x_0 = True  # a score moves the predicted image (Dhariwal and Nichol, 2021, algorithm 2), not the mean

    def __init__(self, log_variance: Callable[..., Tensor], *, eta: float, scaled: bool) -> None:
        """Prepare a trajectory: keep the variance, the share of noise and the scaling.

        Args:
            log_variance: of the objective that the network was trained for.
            eta: the request's, in [0, 1].
            scaled: whether every level has some of the image's signal.
        """
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
        """The mean of the posterior plus deviation * noise; a score moves the mean by variance * gradient.

        Source of the score's part: Dhariwal and Nichol (2021), algorithm 1.
        """
        del look
        mean = ddpm_step(prediction.step, x_t=prediction.x_t, x_0=prediction.x_0)
        small, large = (prediction.x_t.new_tensor(value) for value in ddpm_log_variances(prediction.step, self.before))
        log_variance = self.log_variance(prediction.output, like=prediction.x_t, small=small, large=large)
        if prediction.gradient is not None:
            mean = mean + log_variance.exp() * prediction.gradient
        self.before = prediction.step
        return mean if prediction.noise is None else mean + (0.5 * log_variance).exp() * prediction.noise


class DPMSolver(Euler):
    """DPM-Solver++(2M) (Lu et al., 2022, algorithm 2)."""

    title = "DPM-Solver++"
    before: Prediction | None = None

    def step(self, prediction: Prediction, look: Callable[[Tensor], Tensor]) -> Tensor:
        """DDIM's step to an x_0 extrapolated from the current and the previous prediction."""
        before, self.before = self.before, prediction
        if before is not None:
            x_0 = extrapolated(prediction.step, prediction.x_0, before=before.step, previous_x_0=before.x_0)
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
        """Euler's step, corrected by the prediction at the end of the step."""
        x_next = super().step(prediction, look)
        if prediction.step.next_sigma == 0:
            return x_next
        x_0_next = look(x_next)
        return heun_step(
            prediction.step,
            x_t=prediction.x_t,
            x_0=prediction.x_0,
            x_next=x_next,
            x_0_next=x_0_next,
            scaled=self.scaled,
        )


SAMPLERS: dict[SamplerName, type[Euler]] = {
    "ddpm": DDPM,
    "ddim": DDIM,
    "dpm_solver_pp": DPMSolver,
    "sde_dpm_solver_pp": SDEDPMSolver,
    "heun": Heun,
    "euler": Euler,
}


def ddpm_step(step: Step, *, x_t: Tensor, x_0: Tensor) -> Tensor:
    """Mean of q(x_next | x_t, x_0), Ho et al. (2020), equation 7; the caller adds deviation * noise."""
    coef_x_0 = step.next_signal * step.added_variance / step.sigma**2
    coef_x_t = step.signal / step.next_signal * (step.next_sigma / step.sigma) ** 2
    return coef_x_0 * x_0 + coef_x_t * x_t


def ddpm_log_variances(step: Step, before: Step | None) -> tuple[float, float]:
    """Logarithms of the posterior variance and of beta for a step.

    The posterior variance of the last step is zero; as in `Schedule`, the step before supplies the value.
    """
    large = math.log(step.added_variance)
    if step.next_sigma > 0:
        return math.log(step.posterior_variance), large
    return (math.log(before.posterior_variance) if before else large), large


def ddim_step(step: Step, *, x_t: Tensor, x_0: Tensor, noise: Tensor | None = None, eta: float = 0.0) -> Tensor:
    """Step of DDIM, Song et al. (2021), equation 12; eta 1 is DDPM.

    The noise is derived again from the (clipped) x_0.

    At eta 0 this is also Euler's step of the probability flow, and DPM-Solver++ of order 1.
    """
    variance = eta**2 * step.posterior_variance  # equation 16
    epsilon = (x_t - step.signal * x_0) / step.sigma
    mean = step.next_signal * x_0 + math.sqrt(max(step.next_sigma**2 - variance, 0)) * epsilon
    return mean if noise is None else mean + math.sqrt(variance) * noise


def extrapolated(step: Step, x_0: Tensor, *, before: Step, previous_x_0: Tensor) -> Tensor:
    """The x_0 of DPM-Solver++(2M) (Lu et al., 2022, algorithm 2), from two steps.

    `ddim_step` with the result in place of x_0 is the solver's step at eta 0 and the step of SDE-DPM-Solver++(2M) at
    eta 1. In the last step, where the extrapolation would be infinite, the result is x_0: a step of order 1, like the
    first.
    """
    if math.isinf(step.log_snr_gain):
        return x_0
    return x_0 + step.log_snr_gain / (2 * before.log_snr_gain) * (x_0 - previous_x_0)


def heun_step(step: Step, *, x_t: Tensor, x_0: Tensor, x_next: Tensor, x_0_next: Tensor, scaled: bool) -> Tensor:
    """Heun's correction of x_next, the result of Euler's step.

    Source: Karras et al. (2022), algorithm 1, lines 7 and 8.

    Args:
        x_0_next: the network's prediction from x_next.
        scaled: solve for x_t / signal as a function of sigma / signal, as Karras et al. do; otherwise, as needed for a
            process with no signal at the start, along the straight line between the two levels.
    """
    x_0_mean = (x_0 + x_0_next) / 2
    noise_next = (x_next - step.next_signal * x_0_next) / step.next_sigma
    noise = ((x_t - step.signal * x_0) / step.sigma + noise_next) / 2
    if scaled:
        ratio = step.next_signal / step.signal
        return ratio * x_t + (step.next_sigma - ratio * step.sigma) * noise
    return x_t + (step.next_signal - step.signal) * x_0_mean + (step.next_sigma - step.sigma) * noise
