"""Laws of the likelihood: probabilities add up to one, and the bound of the exact model is the entropy."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from components.models.diffusion.discrete import (
    DiscreteObjective,
    discretized_gaussian_nll,
    interpolated_log_variance,
    normal_kl,
    prior_bits,
)
from components.models.diffusion.schedule import make_schedule
from components.models.diffusion.steps import spaced_timesteps
from tests.known_denoisers import discrete, output_for, respaced, wavy

LEVELS = torch.linspace(-1, 1, 256, dtype=torch.float64)
DATA_DEVIATION = 0.25


@pytest.mark.parametrize("mean", [-1.5, -1.0, 0.0, 0.3, 0.999, 4.0])
@pytest.mark.parametrize("log_deviation", [-8.0, -5.0, -2.0, 0.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_probabilities_of_the_256_values_add_up_to_one(mean, log_deviation, dtype):
    levels = LEVELS.to(dtype)
    log_variance = torch.full_like(levels, 2 * log_deviation)
    nll = discretized_gaussian_nll(levels, mean=torch.full_like(levels, mean), log_variance=log_variance)
    assert nll.isfinite().all()
    total = (-nll).exp().sum().item()
    assert total == pytest.approx(1, abs=4e-6 if dtype == torch.float32 else 1e-9)


def test_far_values_keep_a_likelihood_and_a_gradient():
    """Where a distribution function rounds to 0 or 1 and a floor would hide the gradient."""
    mean = torch.tensor([-0.9, 0.9], requires_grad=True)
    nll = discretized_gaussian_nll(torch.tensor([0.9, -0.9]), mean=mean, log_variance=torch.tensor([-10.0, -10.0]))
    nll.sum().backward()
    assert torch.allclose(nll, torch.full((2,), 1.8**2 / 2 * math.exp(10)), rtol=0.01)
    assert mean.grad is not None
    assert torch.allclose(mean.grad, torch.tensor([-1.0, 1.0]) * 1.8 * math.exp(10), rtol=0.01)


def test_divergence_equals_that_of_torch():
    mean_1, log_1, mean_2, log_2 = torch.randn(4, 5, 3, dtype=torch.float64).unbind()
    normal = lambda mean, log: torch.distributions.Normal(mean, (0.5 * log).exp())  # noqa: E731
    theirs = torch.distributions.kl_divergence(normal(mean_1, log_1), normal(mean_2, log_2))
    torch.testing.assert_close(normal_kl(mean_1, log_1, mean_2, log_2), theirs)


def terms_of(
    denoise: Callable[[Tensor, Tensor], Tensor],
    objective: DiscreteObjective,
    x_0: Tensor,
    *,
    noise: Callable[[int], Tensor],
    steps: list[int] | None = None,
) -> Tensor:
    """All terms of the bound but its prior, (B, N), of the process of all steps or of some."""
    steps = steps or list(range(len(objective.schedule)))
    strided, terms = replace(objective, schedule=respaced(objective.schedule, steps)), []
    for index, step in enumerate(steps):
        time = torch.full((len(x_0),), index)
        x_t = strided.add_noise(x_0, noise(index), time)
        terms.append(strided.bits(denoise(x_t, torch.full_like(time, step)), x_0=x_0, x_t=x_t, time=time))
    return torch.stack(terms, dim=1)


def quantiles(count: int) -> Tensor:
    """Numbers with the mean and variance of a standard normal, exactly."""
    numbers = torch.special.ndtri((torch.arange(count, dtype=torch.float64) + 0.5) / count)
    return numbers / numbers.square().mean().sqrt()


@pytest.mark.parametrize(("name", "num_train_timesteps"), [("linear", 50), ("linear", 100), ("cosine", 50)])
@pytest.mark.parametrize("num_inference_steps", [None, 10])
def test_the_bound_of_the_exact_model_is_the_entropy_in_bits(name, num_train_timesteps, num_inference_steps):
    """Gaussian data: the true reverse variance lies between the two that a learned variance spans."""
    objective = discrete(name, num_train_timesteps, variance="learned_range", loss="hybrid")
    schedule = objective.schedule
    count = num_inference_steps or num_train_timesteps
    steps = spaced_timesteps(num_train_timesteps, count)
    strided = respaced(schedule, steps)

    def denoise(x_t: Tensor, time: Tensor) -> Tensor:
        signal, sigma = objective.levels(time, x_t)
        of_x_t = signal**2 * DATA_DEVIATION**2 + sigma**2
        epsilon = output_for(objective, x_0=signal * DATA_DEVIATION**2 / of_x_t * x_t, x_t=x_t, time=time)
        index = steps.index(int(time[0]))
        previous, beta = strided.tables["alphas_cumprod_prev"][index], strided.betas[index]
        spread = DATA_DEVIATION**2 * sigma**2 / of_x_t  # of x_0 given x_t
        coef_x_0 = beta * previous.sqrt() / (1 - strided.alphas_cumprod[index])
        wanted = (strided.tables["posterior_variance"][index] + coef_x_0**2 * spread).log()
        small, large = strided.tables["posterior_log_variance_clipped"][index], beta.log()
        return torch.cat([epsilon, (2 * (wanted - small) / (large - small) - 1).expand_as(x_t)], dim=1)

    data, noise = torch.meshgrid(DATA_DEVIATION * quantiles(100), quantiles(100), indexing="ij")
    images, draws = data.reshape(1, 1, 100, 100), noise.reshape(1, 1, 100, 100)
    terms = terms_of(denoise, objective, images, noise=lambda index: draws, steps=steps)
    entropy = 0.5 * math.log2(2 * math.pi * math.e * DATA_DEVIATION**2) - math.log2(2 / 255)
    prior = prior_bits(schedule, images)
    # The marginal of x_T is not quite the standard normal that it is coded by.
    assert (prior + terms.sum(1)).item() == pytest.approx(entropy, abs=2e-3 + prior.item())


@pytest.mark.parametrize(("name", "bits"), [("linear", 9.6e-6), ("cosine", 5.8e-10)])
def test_the_prior_costs_next_to_nothing(name, bits):
    """On images with even grey values (methods, B6)."""
    schedule = make_schedule(name, num_train_timesteps=1000)
    assert prior_bits(schedule, LEVELS.reshape(1, 1, 16, 16)).item() == pytest.approx(bits, rel=0.02)
    without = make_schedule(name, num_train_timesteps=1000, zero_terminal_snr=True)
    assert prior_bits(without, LEVELS.reshape(1, 1, 16, 16)).item() == 0


def test_a_learned_variance_spans_posterior_and_beta_and_is_not_squashed():
    small, large = torch.tensor(-9.0), torch.tensor(-4.0)
    values = torch.tensor([-1.0, 1.0, 0.0, 3.0])
    spanned = interpolated_log_variance(values, small=small, large=large)
    torch.testing.assert_close(spanned, torch.tensor([-9.0, -4.0, -6.5, 1.0]))


def losses(loss: str, output: Tensor) -> Tensor:
    objective = discrete("linear", 1000, variance="learned_range", loss=loss)
    time = torch.tensor([0, 1, 300, 999])
    generator = torch.Generator().manual_seed(1)
    x_0, noise = torch.randn(2, 4, 3, 2, 2, generator=generator).clamp(-1, 1).unbind()
    x_t = objective.add_noise(x_0, noise, time)
    return objective.loss(output, x_0=x_0, noise=noise, x_t=x_t, time=time)


def test_the_bound_in_the_hybrid_loss_moves_the_variance_alone():
    output = (0.5 * torch.randn(4, 6, 2, 2)).requires_grad_()
    gradients = {kind: torch.autograd.grad(losses(kind, output).sum(), output)[0] for kind in ("hybrid", "vlb")}
    noise_hat = output.detach()[:, :3].clone().requires_grad_()
    generator = torch.Generator().manual_seed(1)
    _, noise = torch.randn(2, 4, 3, 2, 2, generator=generator).clamp(-1, 1).unbind()
    simple = torch.autograd.grad((noise_hat - noise).square().mean((1, 2, 3)).sum(), noise_hat)[0]
    torch.testing.assert_close(gradients["hybrid"][:, :3], simple)
    assert not torch.allclose(gradients["vlb"][:, :3], simple)
    # T terms of which one is drawn, and a thousandth of that (Nichol and Dhariwal's lambda).
    torch.testing.assert_close(gradients["hybrid"][:, 3:] * 1000, gradients["vlb"][:, 3:], rtol=1e-4, atol=1e-6)


def test_the_bound_is_the_mean_of_the_loss_over_all_steps():
    """The loss of a drawn step is T times its term, so its expectation is the bound without its prior."""
    objective = discrete("cosine", 20, loss="vlb")
    images, noise = torch.randn(2, 2, 1, 4, 4, dtype=torch.float64).clamp(-1, 1).unbind()
    terms = terms_of(partial(objective.apply, wavy), objective, images, noise=lambda index: noise)
    drawn = []
    for index in range(20):
        time = torch.full((2,), index)
        x_t = objective.add_noise(images, noise, time)
        drawn.append(objective.loss(wavy(x_t, time), x_0=images, noise=noise, x_t=x_t, time=time))
    torch.testing.assert_close(torch.stack(drawn).mean(0), terms.sum(1))


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_the_first_step_is_coded_with_the_posterior_variance_of_the_second(variance):
    """A floor of 1e-20 (log -46) in its place ruins likelihoods at index 0."""
    objective = discrete("linear", 1000, variance=variance, loss="vlb")
    x_0 = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    log_variance = objective.log_variance_at(x_0, like=x_0, time=torch.tensor([0]))
    assert log_variance.item() == pytest.approx(-9.817, abs=1e-3)
