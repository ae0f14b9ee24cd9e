"""One step of each sampler, from x_t to the next, cleaner level; x_0 is what the network sees in x_t.

All hold for any process with x_t = signal * x_0 + sigma * noise: the numbers of a `Step` are float64, tensors (B, ...).
"""

import math

import torch
from torch import Tensor

from components.models.diffusion.trajectory import Step


def ddpm_step(step: Step, *, x_t: Tensor, x_0: Tensor) -> Tensor:
    """Mean of q(x_next | x_t, x_0), Ho et al. (2020), equation 7. The caller adds the deviation times the noise."""
    coef_x_0 = step.next_signal * step.added_variance / step.sigma**2
    coef_x_t = step.signal / step.next_signal * (step.next_sigma / step.sigma) ** 2
    return coef_x_0 * x_0 + coef_x_t * x_t


def ddpm_log_variances(step: Step, before: Step | None) -> tuple[float, float]:
    """Logarithms of the posterior variance and of beta.

    The posterior variance of the last step is zero; as in `Schedule`, that of the step before stands in its place.
    """
    large = math.log(step.added_variance)
    if step.next_sigma > 0:
        return math.log(step.posterior_variance), large
    return (math.log(before.posterior_variance) if before else large), large


def ddim_step(step: Step, *, x_t: Tensor, x_0: Tensor, noise: Tensor | None = None, eta: float = 0.0) -> Tensor:
    """Song et al. (2021), equation 12, with the noise derived again from the (clipped) x_0; eta 1 is DDPM.

    At eta 0 this is also Euler's step of the probability flow, and DPM-Solver++ of order 1.
    """
    variance = eta**2 * step.posterior_variance  # equation 16
    epsilon = predicted_noise(step, x_t=x_t, x_0=x_0)
    mean = step.next_signal * x_0 + math.sqrt(max(step.next_sigma**2 - variance, 0)) * epsilon
    return mean if noise is None else mean + math.sqrt(variance) * noise


def predicted_noise(step: Step, *, x_t: Tensor, x_0: Tensor) -> Tensor:
    return (x_t - step.signal * x_0) / step.sigma


def extrapolated(step: Step, *, x_0: Tensor, before: Step | None, previous_x_0: Tensor | None) -> Tensor:
    """The x_0 of DPM-Solver++(2M) (Lu et al., 2022, algorithm 2), from this step and the one before.

    `ddim_step` with it in the place of x_0 is the solver's step at eta 0 and that of SDE-DPM-Solver++(2M) at eta 1.
    Without a step before, and in the last one, where it would go to infinity, it is x_0: a step of order 1.
    """
    if before is None or previous_x_0 is None or math.isinf(step.log_snr_gain):
        return x_0
    return x_0 + step.log_snr_gain / (2 * before.log_snr_gain) * (x_0 - previous_x_0)


def heun_step(step: Step, *, x_t: Tensor, x_0: Tensor, x_next: Tensor, x_0_next: Tensor, scaled: bool) -> Tensor:
    """Heun's correction (Karras et al., 2022, algorithm 1, lines 7 and 8) of x_next, which Euler's step gave.

    Args:
        x_0_next: what the network sees in x_next.
        scaled: solve for x_t / signal as a function of sigma / signal, as Karras et al. do; without, which a process
            with no signal at its start needs, along the straight line between the two levels.
    """
    x_0_mean = (x_0 + x_0_next) / 2
    after = Step(step.next_signal, step.next_sigma, step.next_signal, step.next_sigma)
    noise = (predicted_noise(step, x_t=x_t, x_0=x_0) + predicted_noise(after, x_t=x_next, x_0=x_0_next)) / 2
    if scaled:
        ratio = step.next_signal / step.signal
        return ratio * x_t + (step.next_sigma - ratio * step.sigma) * noise
    return x_t + (step.next_signal - step.signal) * x_0_mean + (step.next_sigma - step.sigma) * noise


def threshold_dynamically(x_0: Tensor, *, percentile: float) -> Tensor:
    """Clip each image to its own quantile of |x_0| and scale that to 1 (Saharia et al., 2022, Imagen, section 2.3).

    Args:
        percentile: in (0, 1]; where the quantile is below 1 this is clipping to [-1, 1].
    """
    bound = torch.quantile(x_0.flatten(1).abs(), percentile, dim=1).clamp(min=1)
    bound = bound.reshape(-1, *[1] * (x_0.ndim - 1))
    return x_0.clamp(-bound, bound) / bound
