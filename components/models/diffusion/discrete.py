"""Diffusion in discrete steps: DDPM, Improved DDPM, v-prediction, min-SNR, variational bound.

Sources: epsilon and bound, Ho et al. (2020); learned variance, hybrid loss and loss-aware steps (equation 18), Nichol
and Dhariwal (2021); v, Salimans and Ho (2022), appendix D; weights, Hang et al. (2023), equation 8. x_0, noise, x_t and
prediction are (B, ...) of one shape; timesteps are (B,), int64 in [0, T), or, where a sampler goes between them,
float64. A history of losses is plain tensors, so that a checkpoint can hold it; every rank must record the same losses
in the same order. Shapes: T num_train_timesteps, K losses kept of each step, B batch."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from components.models.diffusion.schedule import Schedule, Trajectory, expand, karras_sigmas, with_clean_end
from components.models.diffusion.steps import Spaced, spaced_timesteps

PredictionType = Literal["epsilon", "sample", "v_prediction"]
Variance = Literal["fixed_small", "fixed_large", "learned_range"]
LossKind = Literal["simple", "hybrid", "vlb"]

# Of sigma / signal. The linear schedule ends below; the cosine schedule ends near 20,000, where half of the steps would
# see nothing but noise (Karras et al., 2022, table 1, leave out the first of its levels for the same reason).
KARRAS_SIGMA_MAX = 160.0
DATA_STEP = 2 / 255  # distance of neighbors among the 256 values in [-1, 1]


def interpolated_log_variance(values: Tensor, *, small: Tensor, large: Tensor) -> Tensor:
    """Log of the learned variance (Nichol and Dhariwal, 2021, equation 15).
    Values in [-1, 1], the second half of the network's channels (B, C, H, W), span small to large, not squashed: the
    logs of the posterior variance and of beta, for the steps actually taken."""
    fraction = (values + 1) / 2
    return fraction * large + (1 - fraction) * small


def normal_kl(mean_1: Tensor, log_variance_1: Tensor, mean_2: Tensor, log_variance_2: Tensor) -> Tensor:
    """KL divergence from the first diagonal Gaussian to the second, element by element."""
    difference = log_variance_2 - log_variance_1
    return 0.5 * (difference - 1 + (-difference).exp() + (mean_1 - mean_2) ** 2 * (-log_variance_2).exp())


def discretized_gaussian_nll(x_0: Tensor, *, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Negative log likelihood of 8-bit values in [-1, 1], by element (Ho et al., 2020, equation 13).
    Each value owns the interval of 2/255 around it, the two end values the tails beyond: the 256 probabilities add up
    to 1. The normal distribution function is exact; Improved DDPM uses a tanh approximation here. Differences are taken
    of logarithms in the lower tail, so that no far mean and no narrow Gaussian rounds to zero."""
    inverse = (-0.5 * log_variance).exp()
    upper, lower = (x_0 - mean + DATA_STEP / 2) * inverse, (x_0 - mean - DATA_STEP / 2) * inverse
    flip = upper + lower > 0  # mirror an interval mostly above the mean
    low, high = torch.where(flip, -upper, lower), torch.where(flip, -lower, upper)
    log_high = torch.special.log_ndtr(high)
    ratio = (torch.special.log_ndtr(low) - log_high).clamp(max=-torch.finfo(x_0.dtype).tiny)
    inside = log_high + (-torch.expm1(ratio)).log()
    above = torch.where(x_0 > 0.999, torch.special.log_ndtr(-lower), inside)
    return -torch.where(x_0 < -0.999, torch.special.log_ndtr(upper), above)


@dataclass(frozen=True, eq=False)
class DiscreteObjective:
    """Objective with the steps of a schedule for times: the discrete diffusion of DDPM and after.

    Args:
        variance: of the reverse steps; with "learned_range" the network has twice the channels.
        loss_kind: "simple", with the min-SNR weight if there is a gamma; "hybrid" adds the variational bound, whose
            gradient then reaches the variance alone; "vlb" is the bound itself (the objective of Sohl-Dickstein et al.,
            2015).
        rescale_time: the network sees 1000 / T of a step, as in the code of Nichol and Dhariwal (2021).

    Raises ValueError for targets that cannot be learned, as the noise, where the last step has no signal left."""

    schedule: Schedule
    prediction_type: PredictionType
    variance: Variance = "fixed_small"
    loss_kind: LossKind = "simple"
    min_snr_gamma: float | None = None
    rescale_time: bool = False

    def __post_init__(self) -> None:
        no_signal = self.schedule.betas[-1] == 1
        if no_signal and self.prediction_type == "epsilon":
            raise ValueError("zero_terminal_snr needs prediction_type v_prediction or sample, not epsilon")
        if no_signal and self.min_snr_gamma is not None:
            raise ValueError("zero_terminal_snr needs min_snr_gamma None: the last step would weigh nothing")
        if self.loss_kind == "hybrid" and self.variance != "learned_range":
            raise ValueError(f"loss hybrid needs variance learned_range, not {self.variance}")
        if self.loss_kind == "simple" and self.variance == "learned_range":
            raise ValueError("variance learned_range needs loss hybrid or vlb: the simple loss can't train it")

    def times(self, uniform: Tensor) -> Tensor:
        return (uniform.double() * len(self.schedule)).long().clamp(max=len(self.schedule) - 1)

    def levels(self, time: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Factors of `Objective.levels`; between two steps log(sigma / signal) is interpolated."""
        if not time.is_floating_point():
            return self.schedule.signal_and_noise(time, like)
        table = self.schedule.table("log_noise_levels", time.device)
        below = time.double().floor().long().clamp(0, len(table) - 1)
        above = (below + 1).clamp(max=len(table) - 1)
        weight = time.double() - below
        # A time equal to a step is not interpolated: the neighboring level may be infinite.
        level = torch.where(weight == 0, table[below], torch.lerp(table[below], table[above], weight)).exp()  # (B,)
        return expand((1 + level**2).rsqrt(), like), expand((1 + level**-2).rsqrt(), like)

    def add_noise(self, x_0: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        signal, sigma = self.levels(time, x_0)
        return signal * x_0 + sigma * noise

    def apply(self, network: Callable[..., Tensor], x_t: Tensor, time: Tensor, **conditions: Tensor) -> Tensor:
        seen = time * (1000 / len(self.schedule)) if self.rescale_time else time
        return network(x_t, seen, **conditions)

    def loss(self, output: Tensor, *, x_0: Tensor, noise: Tensor, x_t: Tensor, time: Tensor) -> Tensor:
        """Loss (B,) of each sample; the bound counts T times, in bits/dim, and in "hybrid" T / 1000 times.
        T / 1000 is the lambda of 0.001 of Nichol and Dhariwal (2021) in the form of their code: the bound is a sum of T
        terms, of which training draws one."""
        total = len(self.schedule)
        if self.loss_kind == "vlb":
            return total * self.bits(output, x_0=x_0, x_t=x_t, time=time)
        prediction = self.prediction(output, like=x_t).to(x_0.dtype)
        errors = prediction - self.target(x_0=x_0, noise=noise, time=time)
        simple = self.loss_weight(time) * errors.square().mean(dim=tuple(range(1, x_0.ndim)))  # (B,)
        if self.loss_kind == "simple":
            return simple
        stopped = torch.cat([prediction.detach(), output[:, x_t.shape[1] :].to(x_t.dtype)], dim=1)
        return simple + total / 1000 * self.bits(stopped, x_0=x_0, x_t=x_t, time=time)

    def target(self, *, x_0: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        """The target of the network's prediction: noise, x_0, or v = signal * noise - sigma * x_0."""
        if self.prediction_type != "v_prediction":
            return noise if self.prediction_type == "epsilon" else x_0
        signal, sigma = self.schedule.signal_and_noise(time, x_0)
        return signal * noise - sigma * x_0

    def loss_weight(self, time: Tensor) -> Tensor:
        """Weight (B,) float32 of each sample's mean squared error; 1 without a gamma.
        With one it is min(snr, gamma) on the scale of x_0, divided by snr for epsilon and by snr + 1 for v."""
        snr = self.schedule.table("signal_to_noise", time.device)[time].float()
        if self.min_snr_gamma is None:
            return snr.new_ones(snr.shape)
        divisor = {"epsilon": snr, "sample": 1, "v_prediction": snr + 1}[self.prediction_type]
        return snr.clamp(max=self.min_snr_gamma) / divisor

    def bits(self, output: Tensor, *, x_0: Tensor, x_t: Tensor, time: Tensor, clip: bool = False) -> Tensor:
        """A term of the variational bound, in bits/dim, (B,): Ho et al. (2020), equation 5, but its prior.

            -log p(x_0) <=   KL(q(x_T | x_0) | p(x_T))                                         prior
                           + sum over t > 1 of KL(q(x_{t-1} | x_t, x_0) | p(x_{t-1} | x_t))    denoising
                           - log p(x_0 | x_1)                                                  reconstruction

        At time (B,) int64 of 0 the cost of coding the 8-bit x_0, elsewhere the divergence from the true posterior; for
        the prior see `prior_bits`. `clip` limits x_0 to [-1, 1], as sampling does."""
        predicted = self.predict_x_0(output, x_t=x_t, time=time)
        predicted = predicted.clamp(-1, 1) if clip else predicted
        true_mean, true_log_variance = self.schedule.posterior(x_0, x_t, time)
        mean, _ = self.schedule.posterior(predicted, x_t, time)
        log_variance = self.log_variance_at(output, like=x_t, time=time)
        divergence = normal_kl(true_mean, true_log_variance, mean, log_variance)
        nll = discretized_gaussian_nll(x_0, mean=mean, log_variance=log_variance)
        first = (time == 0).reshape(-1, *[1] * (x_0.ndim - 1))
        return torch.where(first, nll, divergence).mean(dim=tuple(range(1, x_0.ndim))) / math.log(2)

    def predict_x_0(self, output: Tensor, *, x_t: Tensor, time: Tensor) -> Tensor:
        prediction = self.prediction(output, like=x_t)
        if self.prediction_type == "sample":
            return prediction
        signal, sigma = self.levels(time, x_t)
        if self.prediction_type == "epsilon":
            return (x_t - sigma * prediction) / signal
        return signal * x_t - sigma * prediction

    def prediction(self, output: Tensor, *, like: Tensor) -> Tensor:
        """The channels of an output without those of a learned variance."""
        return output[:, : like.shape[1]] if self.variance == "learned_range" else output

    def log_variance(self, output: Tensor, *, like: Tensor, small: Tensor, large: Tensor) -> Tensor:
        if self.variance == "learned_range":
            values = output[:, like.shape[1] :].to(like.dtype)
            return interpolated_log_variance(values, small=small, large=large)
        return small if self.variance == "fixed_small" else large

    def log_variance_at(self, output: Tensor, *, like: Tensor, time: Tensor) -> Tensor:
        """Log variance of the reverse step at time (B,) int64, as (B, 1 or C, ...)."""
        small = self.schedule.at("posterior_log_variance_clipped", time, like)
        large = self.schedule.at("log_betas_clipped" if self.variance == "fixed_large" else "log_betas", time, like)
        return self.log_variance(output, like=like, small=small, large=large)

    def trajectory(self, num_inference_steps: int, *, spacing: Spaced = "linspace") -> Trajectory:
        """The steps of `Objective.trajectory`; "karras" interpolates between training steps, with rho = 7.
        "leading_from_1" ends at alphas_cumprod[0]. A spacing that skips a last step without signal is a ValueError."""
        if spacing == "karras":
            return self.karras_trajectory(num_inference_steps)
        steps = spaced_timesteps(len(self.schedule), num_inference_steps, spacing=spacing)
        if self.schedule.betas[-1] == 1 and steps[-1] < len(self.schedule) - 1:
            raise ValueError(f"zero_terminal_snr needs spacing trailing or linspace: {spacing} skips the last step")
        end = [0] if spacing == "leading_from_1" else []
        times = torch.tensor(steps[::-1] + end)
        alphas_cumprod = self.schedule.alphas_cumprod[times]
        signal, sigma = alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()
        return Trajectory(times, signal, sigma) if end else with_clean_end(times, signal, sigma)

    def karras_trajectory(self, num_inference_steps: int) -> Trajectory:
        """Levels of `karras_sigmas`, by interpolation of log sigma, at most a level for each training step."""
        if num_inference_steps > len(self.schedule):
            raise ValueError(f"num_inference_steps must be in [1, {len(self.schedule)}], not {num_inference_steps}")
        table = self.schedule.tables["noise_levels"]
        no_signal = int(table[-1].isinf())  # then the first step is the last one of training
        if len(table) == 1 or (no_signal and num_inference_steps == 1):  # nothing to interpolate between
            return self.trajectory(1)
        largest = min(KARRAS_SIGMA_MAX, table[-1 - no_signal].item())
        level = karras_sigmas(num_inference_steps - no_signal, sigma_min=table[0].item(), sigma_max=largest)
        above = torch.searchsorted(table, level).clamp(1, len(table) - 1)
        low, high = table[above - 1].log(), table[above].log()
        times = above - 1 + ((level.log() - low) / (high - low)).clamp(0, 1)
        signal = (1 + level**2).rsqrt()
        start = torch.tensor([len(table) - 1.0] * no_signal, dtype=torch.float64)
        zero = torch.zeros(no_signal, dtype=torch.float64)
        return with_clean_end(
            torch.cat([start, times]), torch.cat([zero, signal]), torch.cat([zero + 1, level * signal])
        )


def prior_bits(schedule: Schedule, x_0: Tensor) -> Tensor:
    """KL divergence of q(x_T | x_0) from a standard normal in bits/dim, (B,)."""
    last = torch.full((len(x_0),), len(schedule) - 1, device=x_0.device)
    signal, _ = schedule.signal_and_noise(last, x_0)
    log_variance = schedule.at("log_sigma_squared", last, x_0)
    zero = torch.zeros_like(x_0)
    nats = normal_kl(signal * x_0, log_variance, zero, zero)
    return nats.mean(dim=tuple(range(1, x_0.ndim))) / math.log(2)


KEPT = 10  # losses of each step
UNIFORM_SHARE = 0.001  # of the probability, so that no step is ever forgotten


class LossHistory(NamedTuple):
    """The latest losses of each training step, recorded by `record` and read by `probabilities`."""

    losses: Tensor  # (T, K) float64, the latest of each step, oldest first
    counts: Tensor  # (T,) int64 in [0, K], how many losses are recorded


def empty_history(num_train_timesteps: int, device: torch.device | str = "cpu") -> LossHistory:
    return LossHistory(
        losses=torch.zeros(num_train_timesteps, KEPT, dtype=torch.float64, device=device),
        counts=torch.zeros(num_train_timesteps, dtype=torch.int64, device=device),
    )


def record(history: LossHistory, *, timesteps: Tensor, losses: Tensor) -> LossHistory:
    """The history with the losses (B,) at timesteps (B,) appended in order; infinite and NaN left out.
    All on the device of the history; of each step the last K stay."""
    total, counts = len(history.counts), history.counts
    finite = losses.isfinite()
    new = torch.zeros_like(counts).index_add_(0, timesteps, finite.long())  # (T,)
    left_out = (counts + new - KEPT).clamp(min=0)  # (T,) of the oldest
    place = torch.arange(KEPT, device=counts.device) + left_out[:, None]  # (T, K), former places
    kept = torch.where(place < counts[:, None], history.losses.gather(1, place.clamp(max=KEPT - 1)), 0.0)
    same = (timesteps[:, None] == timesteps) & finite  # (B, B)
    earlier = same.tril(-1).sum(dim=1)  # (B,), finite losses of the same step before each loss
    column = counts[timesteps] + earlier - left_out[timesteps]  # (B,)
    spare = total * KEPT  # the place of losses that are left out
    target = torch.where(finite & (column >= 0), timesteps * KEPT + column, spare)
    flat = torch.cat([kept.flatten(), kept.new_zeros(1)]).scatter(0, target, losses.double())
    return LossHistory(flat[:spare].view(total, KEPT), (counts + new).clamp(max=KEPT))


def probabilities(history: LossHistory) -> Tensor:
    """Probability of each step, (T,) float64: proportional to the root mean square of the step's losses.
    Even until all steps have K losses."""
    total = len(history.counts)
    even = torch.full((total,), 1 / total, dtype=torch.float64, device=history.counts.device)
    moments = history.losses.square().mean(dim=1).sqrt()
    uneven = (1 - UNIFORM_SHARE) * moments / moments.sum() + UNIFORM_SHARE * even
    return torch.where((history.counts < KEPT).any(), even, uneven)


def draw_timesteps(history: LossHistory, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Steps (B,) int64 from numbers (B,) in [0, 1), and the weights (B,) float32 of the losses.
    The weights 1 / (T p) make the mean of the weighted losses an unbiased estimate of the mean over even draws. All
    tensors are on the same device."""
    chances = probabilities(history)
    edges = chances.cumsum(0)
    timesteps = torch.searchsorted(edges, uniform.double(), right=True).clamp(max=len(chances) - 1)
    weights = 1 / (len(chances) * chances[timesteps])
    return timesteps, weights.float()
