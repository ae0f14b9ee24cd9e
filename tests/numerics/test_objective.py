"""Laws of what is learned: prediction types are three ways to say one thing, and so are the three processes."""

import math
from typing import Any

import pytest
import torch
from denoising_diffusion_pytorch import GaussianDiffusion
from denoising_diffusion_pytorch.elucidated_diffusion import ElucidatedDiffusion
from denoising_diffusion_pytorch.learned_gaussian_diffusion import LearnedGaussianDiffusion
from diffusers import DDPMScheduler
from torch import Tensor, nn

from components.models.diffusion.discrete import KEPT, draw_timesteps, empty_history, probabilities, record
from components.models.diffusion.objective import EDMObjective, FlowObjective, Objective, make_objective
from components.models.diffusion.schedule import make_schedule
from components.training.randomness import Draws
from tests.known_denoisers import discrete, output_for

PREDICTION_TYPES = ["epsilon", "sample", "v_prediction"]
SCHEDULE = make_schedule("linear", num_train_timesteps=1000)
TIMESTEPS = torch.tensor([0, 1, 10, 250, 500, 999])
OBJECTIVES: dict[str, Objective] = {
    **{prediction_type: discrete(prediction_type=prediction_type) for prediction_type in PREDICTION_TYPES},
    "zero_terminal_snr": discrete(prediction_type="v_prediction", zero_terminal_snr=True),
    "edm": EDMObjective(),
    "flow": FlowObjective(time_density="logit_normal"),
}
UNIFORM = torch.tensor([0.0, 0.1, 0.3, 0.5, 0.9, 1 - 2**-24])


def images() -> tuple[Tensor, Tensor]:
    return torch.randn(2, len(TIMESTEPS), 3, 4, 4, dtype=torch.float64).unbind()


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_the_true_target_implies_the_true_image(prediction_type):
    x_0, noise = images()
    x_t = SCHEDULE.add_noise(x_0, noise, TIMESTEPS)
    objective = discrete(prediction_type=prediction_type)
    true = objective.target(x_0=x_0, noise=noise, time=TIMESTEPS)
    torch.testing.assert_close(objective.predict_x_0(true, x_t=x_t, time=TIMESTEPS), x_0)


def test_a_network_that_sees_times_below_1000_sees_them_of_every_number_of_steps():
    """As `rescale_timesteps` of openai/improved-diffusion: t * (1000 / T), fractions too."""
    seen: list[Tensor] = []
    network = lambda x_t, time: seen.append(time)  # noqa: E731
    for rescale_time in (True, False):
        objective = discrete(num_train_timesteps=4000, rescale_time=rescale_time)
        objective.apply(network, images()[0], torch.tensor([0, 1, 3999]))
    assert [time.tolist() for time in seen] == [[0.0, 0.25, 999.75], [0, 1, 3999]]


def test_v_is_the_velocity_of_diffusers():
    x_0, noise = (tensor.float() for tensor in images())
    ours = discrete(prediction_type="v_prediction").target(x_0=x_0, noise=noise, time=TIMESTEPS)
    peer = DDPMScheduler(1000, beta_start=1e-4, beta_end=2e-2).get_velocity(x_0, noise, TIMESTEPS)
    torch.testing.assert_close(ours, peer, atol=3.3e-5, rtol=0)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_without_gamma_every_sample_weighs_one(prediction_type):
    weight = discrete(prediction_type=prediction_type).loss_weight(TIMESTEPS)
    assert torch.equal(weight, torch.ones(len(TIMESTEPS)))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_output_for_a_image_costs_nothing_and_implies_it_and_any_other_costs(name):
    objective = OBJECTIVES[name]
    x_0, noise = images()
    time = objective.times(UNIFORM)
    x_t = objective.add_noise(x_0, noise, time)
    output = output_for(objective, x_0=x_0, x_t=x_t, time=time)
    torch.testing.assert_close(objective.predict_x_0(output, x_t=x_t, time=time), x_0, atol=1e-4, rtol=0)
    known = {"x_0": x_0, "noise": noise, "x_t": x_t, "time": time}
    torch.testing.assert_close(objective.loss(output, **known), torch.zeros(6).double(), atol=1e-7, rtol=0)
    assert (objective.loss(output + 0.1, **known) > 5e-3).all()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_noise_is_added_at_the_levels_of_the_time_and_training_reaches_both_ends(name):
    objective = OBJECTIVES[name]
    x_0, noise = images()
    time = objective.times(UNIFORM)
    signal, sigma = objective.levels(time, x_0)
    torch.testing.assert_close(objective.add_noise(x_0, noise, time), signal * x_0 + sigma * noise)
    ratio = (sigma / signal).flatten()
    assert (ratio.diff() > 0).all()
    assert ratio[0] < 0.02
    assert ratio[-1] > 60
    assert time.isfinite().all()


def test_between_two_steps_the_logarithm_of_the_noise_level_is_interpolated():
    objective = discrete("cosine", 100)
    like = torch.zeros(1, 1, dtype=torch.float64)
    between = [torch.cat(objective.levels(torch.tensor([t]), like)) for t in (40, 41, 40.0, 40.5, 41.0)]
    torch.testing.assert_close(between[2], between[0])
    torch.testing.assert_close(between[4], between[1])
    (a, b), (c, d), (e, f) = between[0], between[1], between[3]
    torch.testing.assert_close((f / e).square(), (b / a) * (d / c))
    torch.testing.assert_close(e**2 + f**2, torch.ones_like(e))


def test_edm_gives_and_asks_for_unit_variance_at_every_level():
    """Karras et al. (2022), appendix B.6, exactly: second moments are linear, so two unit sources are enough."""
    objective = EDMObjective()
    sigma = torch.logspace(-3, 2, 6, dtype=torch.float64)
    x_0 = torch.tensor([0.5, 0.0], dtype=torch.float64).reshape(1, 2, 1, 1)  # what sigma_data and the noise are
    noise = torch.tensor([0.0, 1.0], dtype=torch.float64).reshape(1, 2, 1, 1)
    x_t = objective.add_noise(x_0.expand(6, 2, 1, 1), noise.expand(6, 2, 1, 1), sigma)
    given = {}
    objective.apply(lambda x, time: given.update(x=x, time=time), x_t, sigma)
    torch.testing.assert_close(given["x"].square().sum((1, 2, 3)), torch.ones(6, dtype=torch.float64))
    torch.testing.assert_close(given["time"], sigma.log() / 4)
    asked = output_for(objective, x_0=x_0, x_t=x_t, time=sigma)
    torch.testing.assert_close(asked.square().sum((1, 2, 3)), torch.ones(6, dtype=torch.float64))


def test_a_straight_path_has_one_velocity():
    x_0, noise = images()
    objective, time = FlowObjective(), torch.linspace(0, 0.9, 6, dtype=torch.float64)
    step = (objective.add_noise(x_0, noise, time + 0.1) - objective.add_noise(x_0, noise, time)) / 0.1
    torch.testing.assert_close(step, noise - x_0)
    assert (objective.loss(step, x_0=x_0, noise=noise, x_t=step, time=time) < 1e-20).all()


def test_training_times_have_their_distribution():
    uniform = (torch.arange(10_000) + 0.5) / 10_000
    steps = discrete("cosine", 50).times(uniform)
    assert torch.equal(steps.bincount(minlength=50), torch.full((50,), 200))
    log_sigma = EDMObjective().times(uniform).log()
    assert log_sigma.mean().item() == pytest.approx(-1.2, abs=1e-3)
    assert log_sigma.std().item() == pytest.approx(1.2, abs=5e-3)
    logits = FlowObjective(time_density="logit_normal").times(uniform).logit()
    assert (logits.mean().abs() < 1e-3, logits.std().item()) == (True, pytest.approx(1, abs=5e-3))
    assert torch.equal(FlowObjective().times(uniform), uniform)


def test_the_times_of_a_training_follow_the_logit_normal_density():
    """Kolmogorov-Smirnov against the integral of the density of Esser et al. (2024), equation 19, m = 0 and s = 1."""
    positions = torch.arange(10_000)
    times = FlowObjective(time_density="logit_normal").times(Draws(0).uniform(positions, "timestep"))
    grid = torch.linspace(0, 1, 20_001, dtype=torch.float64)[1:-1]
    density = torch.exp(-grid.logit().square() / 2) / (math.sqrt(2 * math.pi) * grid * (1 - grid))
    cumulative = torch.cumulative_trapezoid(density, grid)
    assert cumulative[-1].item() == pytest.approx(1, abs=1e-6)
    seen = torch.searchsorted(times.double().sort().values, grid[1:], right=True) / len(positions)
    assert (seen - cumulative).abs().max() < 1.95 / math.sqrt(len(positions))  # exceeded once in a thousand seeds


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "ddpm"}, "unknown objective"),
        ({"zero_terminal_snr": True, "prediction_type": "epsilon"}, "zero_terminal_snr needs prediction_type"),
        ({"zero_terminal_snr": True, "prediction_type": "sample", "min_snr_gamma": 5.0}, "min_snr_gamma None"),
        ({"loss": "hybrid"}, "loss hybrid needs variance learned_range"),
        ({"variance": "learned_range"}, "learned_range needs loss hybrid or vlb"),
        ({"num_train_timesteps": 20}, "impossible noise schedule"),
    ],
)
def test_settings_that_cannot_be_learned_are_refused_in_one_line(settings, message):
    sound = {"kind": "discrete", "schedule": "linear", "num_train_timesteps": 100, "prediction_type": "v_prediction"}
    with pytest.raises(ValueError, match=message) as refused:
        make_objective(sound | settings)
    assert "\n" not in str(refused.value)


class FixedOutput(nn.Module):
    """What the peers' losses need to know of a network; its output is given."""

    channels, self_condition, random_or_learned_sinusoidal_cond = 3, False, False

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output, self.out_dim = output, output.shape[1]

    def forward(self, x_t: Tensor, time: Tensor, x_self_cond: Tensor | None = None) -> Tensor:
        return self.output


PEER = {"image_size": 4, "timesteps": 1000, "beta_schedule": "cosine"}
OBJECTIVE_NAMES = {"epsilon": "pred_noise", "sample": "pred_x0", "v_prediction": "pred_v"}


def losses_of(objective: Objective, output: Tensor, x_0: Tensor, noise: Tensor, time: Tensor) -> Tensor:
    x_t = objective.add_noise(x_0, noise, time)
    return objective.loss(output, x_0=x_0, noise=noise, x_t=x_t, time=time)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("min_snr_gamma", [1.0, 5.0])
def test_min_snr_losses_equal_those_of_denoising_diffusion_pytorch(prediction_type, min_snr_gamma):
    x_0, noise, output = torch.randn(3, len(TIMESTEPS), 3, 4, 4).unbind()
    options: dict[str, Any] = PEER | {"objective": OBJECTIVE_NAMES[prediction_type], "min_snr_loss_weight": True}
    peer = GaussianDiffusion(FixedOutput(output), **options, min_snr_gamma=min_snr_gamma)
    theirs = peer.p_losses(x_0, TIMESTEPS, noise=noise, loss_reduction="none")
    objective = discrete("cosine", prediction_type=prediction_type, min_snr_gamma=min_snr_gamma)
    ours = losses_of(objective, output, x_0, noise, TIMESTEPS)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)


def test_the_hybrid_loss_equals_that_of_denoising_diffusion_pytorch_but_for_the_first_step():
    """Its floor of 1e-20 below the posterior variance ruins the first step: 33 bits for 2 (methods, B6)."""
    time = TIMESTEPS[1:]
    x_0, noise, values = torch.randn(3, len(time), 3, 4, 4).clamp(-1, 1).unbind()
    output = torch.cat([noise + 0.1 * torch.randn_like(noise), values], dim=1)
    peer = LearnedGaussianDiffusion(FixedOutput(output), vb_loss_weight=1.0, objective="pred_noise", **PEER)
    theirs = peer.p_losses(x_0, time, noise=noise, loss_reduction="none")
    ours = losses_of(discrete("cosine", variance="learned_range", loss="hybrid"), output, x_0, noise, time)
    torch.testing.assert_close(ours, theirs, atol=4e-4, rtol=1e-4)


def test_the_edm_loss_equals_that_of_denoising_diffusion_pytorch():
    image, output = torch.rand(6, 3, 4, 4), torch.randn(6, 3, 4, 4)
    sigma = torch.logspace(-2, 1.5, 6)
    network = FixedOutput(output)
    network.random_or_learned_sinusoidal_cond = True
    peer = ElucidatedDiffusion(network, image_size=4)
    torch.manual_seed(3)
    theirs = peer(image, sigma=sigma, loss_reduction="none")
    torch.manual_seed(3)
    ours = losses_of(EDMObjective(), output, image * 2 - 1, torch.randn(6, 3, 4, 4), sigma)
    torch.testing.assert_close(ours, theirs, atol=0, rtol=2e-4)


T = 5


def warm(losses: torch.Tensor) -> torch.Tensor:
    history = empty_history(T)
    for _ in range(KEPT):
        history = record(history, timesteps=torch.arange(T), losses=losses)
    return history


def test_until_every_step_has_its_losses_all_are_drawn_alike():
    history = empty_history(T)
    for _ in range(3 * KEPT):
        history = record(history, timesteps=torch.arange(T - 1), losses=torch.rand(T - 1))
        torch.testing.assert_close(probabilities(history), torch.full((T,), 1 / T, dtype=torch.float64))


def test_then_by_the_root_of_the_mean_squared_loss_and_never_not_at_all():
    losses = torch.tensor([4.0, 1.0, 2.0, 0.0, 1.0])
    expected = 0.999 * losses.double() / 8 + 0.001 / T
    torch.testing.assert_close(probabilities(warm(losses)), expected)
    assert probabilities(warm(losses))[3] > 0


def test_the_latest_losses_count_and_old_ones_are_forgotten():
    history = warm(torch.ones(T))
    for loss in range(1, 2 * KEPT + 1):
        history = record(history, timesteps=torch.tensor([2]), losses=torch.tensor([float(loss)]))
    assert history.losses[2].tolist() == [float(loss) for loss in range(KEPT + 1, 2 * KEPT + 1)]
    assert history.losses[1].tolist() == [1.0] * KEPT


def test_a_loss_that_is_not_finite_is_not_recorded_and_the_old_history_stays_as_it_was():
    before = warm(torch.ones(T))
    kept = before.losses.clone()
    after = record(before, timesteps=torch.tensor([0, 1, 1]), losses=torch.tensor([float("nan"), float("inf"), 3.0]))
    assert torch.equal(before.losses, kept)
    assert torch.equal(after.losses[0], kept[0])
    assert after.losses[1].tolist() == [1.0] * (KEPT - 1) + [3.0]


def test_losses_are_recorded_alike_whether_they_come_at_once_or_in_parts():
    timesteps, losses = torch.tensor([1, 1, 2, 1]), torch.tensor([1.0, 2.0, 3.0, 4.0])
    together = record(empty_history(T), timesteps=timesteps, losses=losses)
    parts = record(empty_history(T), timesteps=timesteps[:2], losses=losses[:2])
    parts = record(parts, timesteps=timesteps[2:], losses=losses[2:])
    assert torch.equal(together.losses, parts.losses)
    assert torch.equal(together.counts, parts.counts)


def test_steps_are_drawn_with_their_probability_and_the_weights_keep_the_mean_loss():
    losses = torch.tensor([4.0, 1.0, 2.0, 0.5, 1.0])
    history = warm(losses)
    uniform = (torch.arange(20_000) + 0.5) / 20_000
    timesteps, weights = draw_timesteps(history, uniform)
    drawn = timesteps.bincount(minlength=T) / 20_000
    torch.testing.assert_close(drawn, probabilities(history).float(), atol=1e-4, rtol=0)
    assert (weights * losses[timesteps]).mean().item() == pytest.approx(losses.mean().item(), rel=1e-3)
    # Without a history the draw is even, and weighs one.
    timesteps, weights = draw_timesteps(empty_history(4), torch.tensor([0.0, 0.24, 0.25, 0.5, 0.75, 1 - 2**-24]))
    assert timesteps.tolist() == [0, 0, 1, 2, 3, 3]
    assert torch.equal(weights, torch.ones(6))
