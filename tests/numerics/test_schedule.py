"""Laws of the forward process; diffusers is the independent implementation."""

import pytest
import torch
from diffusers import DDPMScheduler

from components.models.diffusion.betas import SCHEDULES
from components.models.diffusion.schedule import make_schedule
from tests.known_denoisers import discrete


def peer(name: str, beta_start: float = 1e-4, beta_end: float = 2e-2, **options: bool) -> DDPMScheduler:
    name = {"cosine": "squaredcos_cap_v2"}.get(name, name)
    return DDPMScheduler(1000, beta_start=beta_start, beta_end=beta_end, beta_schedule=name, **options)


@pytest.mark.parametrize(
    ("name", "ends", "of_peer", "tolerance"),
    [
        ("linear", (), (1e-4, 2e-2), 1.4e-8),
        ("cosine", (), (1e-4, 2e-2), 2.2e-7),
        ("scaled_linear", (), (0.00085, 0.012), 1.4e-8),  # latent diffusion, between roots
        *((name, (1e-6, 1e-2), (1e-6, 1e-2), 1.4e-8) for name in ("linear", "scaled_linear")),  # SR3 and Palette
    ],
)
def test_betas_equal_those_of_diffusers(name, ends, of_peer, tolerance):
    given = dict(zip(("beta_start", "beta_end"), ends, strict=False))
    betas = make_schedule(name, num_train_timesteps=1000, **given).betas
    torch.testing.assert_close(betas, peer(name, *of_peer).betas.double(), atol=tolerance, rtol=0)


@pytest.mark.parametrize("name", ["linear", "scaled_linear", "cosine"])
def test_zero_terminal_snr_equals_that_of_diffusers_and_leaves_the_first_step_as_it_was(name):
    ends = {} if name == "cosine" else {"beta_start": 1e-4, "beta_end": 2e-2}
    ours = make_schedule(name, num_train_timesteps=1000, zero_terminal_snr=True, **ends)
    theirs = peer(name, rescale_betas_zero_snr=True)
    torch.testing.assert_close(ours.betas, theirs.betas.double(), atol=1e-5, rtol=0)
    assert ours.alphas_cumprod[-1] == 0
    assert ours.tables["signal_to_noise"][999] == 0
    assert ours.betas[0].item() == pytest.approx(peer(name).betas[0].item(), rel=1e-3)
    x_0, noise = torch.randn(2, 1, 3, 4, 4).unbind()
    assert torch.equal(ours.add_noise(x_0, noise, torch.tensor([999])), noise)


@pytest.mark.parametrize(("num_train_timesteps", "left"), [(1000, 4.04e-5), (4000, 4.25e-5), (100, 2.04e-5)])
def test_linear_leaves_about_as_much_signal_at_any_length(num_train_timesteps, left):
    schedule = make_schedule("linear", num_train_timesteps=num_train_timesteps)
    assert schedule.alphas_cumprod[-1].item() == pytest.approx(left, rel=2e-3)


def test_cosine_clips_exactly_one_beta():
    schedule = make_schedule("cosine", num_train_timesteps=1000)
    assert (schedule.betas == 0.999).sum() == 1
    assert schedule.alphas_cumprod[-1].item() == pytest.approx(2.43e-9, rel=2e-3)


def test_tables_are_float64_and_what_is_gathered_has_the_dtype_of_the_image():
    schedule = make_schedule("cosine", num_train_timesteps=50)
    assert schedule.betas.dtype == schedule.alphas_cumprod.dtype == torch.float64
    x_0 = torch.zeros(2, 3, 4, 4)
    assert schedule.add_noise(x_0, x_0, torch.tensor([0, 49])).dtype == torch.float32


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_noise_is_added_as_diffusers_adds_it(name):
    x_0, noise = torch.randn(2, 8, 3, 4, 4).unbind()
    timesteps = torch.tensor([0, 1, 2, 250, 500, 750, 998, 999])
    ours = make_schedule(name, num_train_timesteps=1000).add_noise(x_0, noise, timesteps)
    torch.testing.assert_close(ours, peer(name).add_noise(x_0, noise, timesteps), atol=3.3e-5, rtol=0)


@pytest.mark.parametrize("name", SCHEDULES)
def test_posterior_is_what_bayes_rule_gives(name):
    """q(x_{t-1} | x_t, x_0) is the product of two Gaussians: precisions add, and weigh the means."""
    schedule = make_schedule(name, num_train_timesteps=40)
    timesteps = torch.arange(1, 40)
    x_0, x_t = torch.randn(2, 39, 1, dtype=torch.float64).unbind()
    beta, previous = schedule.betas[1:, None], schedule.tables["alphas_cumprod_prev"][1:, None]
    precision = (1 - beta) / beta + 1 / (1 - previous)
    mean = ((1 - beta).sqrt() / beta * x_t + previous.sqrt() / (1 - previous) * x_0) / precision
    ours, log_variance = schedule.posterior(x_0, x_t, timesteps)
    torch.testing.assert_close(ours, mean)
    torch.testing.assert_close(log_variance, -precision.log())


def test_the_shortest_possible_schedules_are_finite():
    for schedule in (make_schedule("linear", num_train_timesteps=21), make_schedule("cosine", num_train_timesteps=1)):
        assert schedule.tables["posterior_log_variance_clipped"].isfinite().all()
        assert (schedule.alphas_cumprod > 0).all()


@pytest.mark.parametrize("name", SCHEDULES)
def test_signal_to_noise_falls_with_time(name):
    snr = make_schedule(name, num_train_timesteps=100).tables["signal_to_noise"].float()
    assert (snr.diff() < 0).all()


@pytest.mark.parametrize(
    "options",
    [
        *({"name": "linear", "num_train_timesteps": steps} for steps in (20, 5, 0)),
        {"name": "cosine", "num_train_timesteps": -3},
        {"name": "sigmoid"},
        {"name": "linear", "beta_start": 1e-4},
        {"name": "linear", "beta_start": 1e-4, "beta_end": 1.0},
        {"name": "scaled_linear", "beta_start": -1e-4, "beta_end": 0.5},
        {"name": "cosine", "beta_start": 1e-4, "beta_end": 2e-2},
        {"name": "cosine", "num_train_timesteps": 1, "zero_terminal_snr": True},
    ],
)
def test_options_that_make_no_schedule_are_refused_in_one_line(options):
    with pytest.raises(ValueError, match=r"^[^\n]+$"):
        make_schedule(**({"num_train_timesteps": 100} | options))


def test_respacing_keeps_the_signal_of_each_kept_step_and_its_original_index():
    objective = discrete("linear", 1000)
    trajectory = objective.trajectory(4)
    assert trajectory.times.tolist() == [999, 666, 333, 0]
    kept = objective.schedule.alphas_cumprod[trajectory.times]
    torch.testing.assert_close(trajectory.signal[:-1] ** 2, kept, atol=0, rtol=1e-12)
