"""Laws of guidance: classifier-free, by a weaker network and by a classifier."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from components.models.diffusion.guidance import classifier_score, guide
from components.models.diffusion.objective import EDMObjective, FlowObjective, Objective
from components.models.diffusion.samplers import sample
from tests.known_denoisers import discrete, output_for, seeded_noise

OBJECTIVE = discrete("cosine", 50)
X_T, TIMESTEPS = torch.randn(4, 3, 2, 2), torch.tensor([5, 10, 20, 30])
LABEL, NULL, LOW_RES = torch.tensor([1, 2, 3, 4]), torch.full((4,), 9), torch.randn(4, 3, 2, 2)


class CountingModel:
    """Depends on every argument, sample by sample, and remembers the batch sizes that it was called with."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, x_t: Tensor, timesteps: Tensor, *, label: Tensor, low_res: Tensor) -> Tensor:
        self.batches.append(len(x_t))
        return torch.sin(x_t * label[:, None, None, None]) + low_res * timesteps[:, None, None, None] / 100


def conditional(label: Tensor) -> Tensor:
    return CountingModel()(X_T, TIMESTEPS, label=label, low_res=LOW_RES)


def guided(guidance_scale: Any, model: Callable[..., Tensor] | None = None, **options: Any) -> Tensor:
    condition = {"label": LABEL, "low_res": LOW_RES}
    denoise = guide(OBJECTIVE, model or CountingModel(), condition, {"label": NULL}, guidance_scale, **options)
    return denoise(X_T, TIMESTEPS)


@pytest.mark.parametrize("guidance_scale", [0.0, 0.5, 3.0, 7.5])
def test_guidance_extrapolates_from_the_null_to_the_condition_and_keeps_what_has_no_null(guidance_scale):
    expected = conditional(NULL) + guidance_scale * (conditional(LABEL) - conditional(NULL))
    torch.testing.assert_close(guided(guidance_scale), expected)


def test_guidance_moves_the_first_channels_alone_where_it_is_told_so():
    """As `forward_with_cfg` of facebookresearch/DiT: the rest is the conditional half's."""
    found = guided(3.0, channels=2)
    assert torch.equal(found[:, :2], guided(3.0)[:, :2])
    assert torch.equal(found[:, 2:], conditional(LABEL)[:, 2:])
    assert torch.equal(guided(3.0, channels=9), guided(3.0))


@pytest.mark.parametrize("guidance_scale", [1, 1.0, torch.ones(4), {"label": 1.0}])
def test_scale_1_changes_nothing_and_runs_the_network_once_and_any_other_a_doubled_batch(guidance_scale):
    model = CountingModel()
    assert torch.equal(guided(guidance_scale, model), conditional(LABEL))
    assert model.batches == [4]
    guided(2.0, model)
    assert model.batches == [4, 8]


def test_each_sample_has_its_own_scale():
    scales = torch.tensor([1.0, 0.0, 2.0, 7.0])
    together = guided(scales)
    for i, scale in enumerate(scales.tolist()):
        torch.testing.assert_close(together[i], guided(scale)[i])
    assert torch.equal(together[0], conditional(LABEL)[0])


def of_two(x_t: Tensor, timesteps: Tensor, *, label: Tensor, text: Tensor, low_res: Tensor) -> Tensor:
    a, b = label[:, None, None, None], text[:, :1, None, None]
    return torch.sin(x_t * a) + torch.cos(x_t * b) * a + low_res


def test_conditions_with_a_scale_each_are_guided_alone_and_summed():
    text, empty = torch.tensor([[2, 1], [4, 1], [6, 1], [8, 1]]), torch.zeros(4, 2, dtype=torch.int64)
    condition, null = {"label": LABEL, "text": text, "low_res": LOW_RES}, {"label": NULL, "text": empty}

    def plain(label: Tensor, words: Tensor) -> Tensor:
        return of_two(X_T, TIMESTEPS, label=label, text=words, low_res=LOW_RES)

    nothing = plain(NULL, empty)
    expected = nothing + 2 * (plain(LABEL, empty) - nothing) + 5 * (plain(NULL, text) - nothing)
    made = guide(OBJECTIVE, of_two, condition, null, {"label": 2.0, "text": torch.full((4,), 5.0)})(X_T, TIMESTEPS)
    torch.testing.assert_close(made, expected)
    # A condition without a scale is never null.
    kept = guide(OBJECTIVE, of_two, condition, null, {"label": 3.0})(X_T, TIMESTEPS)
    torch.testing.assert_close(kept, plain(NULL, text) + 3 * (plain(LABEL, text) - plain(NULL, text)))


def test_a_weaker_network_takes_the_place_of_the_unconditional_one():
    def weaker(x_t: Tensor, timesteps: Tensor, **conditions: Tensor) -> Tensor:
        return 0.5 * CountingModel()(x_t, timesteps, **conditions)

    strong = conditional(LABEL)
    torch.testing.assert_close(guided(3.0, weaker=weaker), 0.5 * strong + 3 * 0.5 * strong)
    assert torch.equal(guided(1.0, weaker=weaker), strong)
    unconditional = guide(OBJECTIVE, lambda x, t: x.sin(), {}, {}, 2.0, weaker=lambda x, t: x.cos())(X_T, TIMESTEPS)
    torch.testing.assert_close(unconditional, 2 * X_T.sin() - X_T.cos())


@pytest.mark.parametrize("objective", [OBJECTIVE, EDMObjective(), FlowObjective()])
def test_outside_the_interval_of_noise_levels_nothing_is_guided_and_the_network_runs_once(objective):
    model, condition = CountingModel(), {"label": LABEL, "low_res": LOW_RES}
    denoise = guide(objective, model, condition, {"label": NULL}, 4.0, interval=(0.3, 2.0))
    trajectory = objective.trajectory(20)
    for time, level in zip(trajectory.times, (trajectory.sigma / trajectory.signal)[:-1], strict=True):
        denoise(X_T, time.expand(4))
        assert model.batches.pop() == (8 if 0.3 <= level <= 2.0 else 4)


def test_a_learned_variance_is_that_of_the_conditional_output():
    def model(x_t: Tensor, timesteps: Tensor, **conditions: Tensor) -> Tensor:
        variance = conditions["low_res"] * conditions["label"].reshape(-1, 1, 1, 1)
        return torch.cat([CountingModel()(x_t, timesteps, **conditions), variance], dim=1)

    both = guided(4.0, model)
    torch.testing.assert_close(both[:, :3], guided(4.0))
    assert torch.equal(both[:, 3:], LOW_RES * LABEL.reshape(-1, 1, 1, 1))


def test_rescaling_brings_the_deviation_back_and_keeps_the_direction():
    plain, back, half = guided(6.0), guided(6.0, rescale=1.0), guided(6.0, rescale=0.5)
    torch.testing.assert_close(back.std(dim=(1, 2, 3)), conditional(LABEL).std(dim=(1, 2, 3)))
    torch.testing.assert_close(half, (plain + back) / 2)
    torch.testing.assert_close(torch.cosine_similarity(back.flatten(1), plain.flatten(1)), torch.ones(4))


def test_what_does_not_go_together_is_refused():
    condition = {"label": LABEL}
    with pytest.raises(ValueError, match="text"):
        guide(OBJECTIVE, CountingModel(), condition, {"text": NULL}, 2.0)
    with pytest.raises(ValueError, match="text"):
        guide(OBJECTIVE, CountingModel(), condition, {"label": NULL}, {"text": 2.0})
    for options in ({"rescale": 0.5}, {"weaker": CountingModel()}):
        with pytest.raises(ValueError, match="one guidance_scale"):
            guide(OBJECTIVE, CountingModel(), condition, {"label": NULL}, {"label": 2.0}, **options)


def test_guidance_comes_before_clipping():
    condition = {"label": LABEL, "low_res": LOW_RES}
    denoise = guide(OBJECTIVE, CountingModel(), condition, {"label": NULL}, 5.0)
    shown = []
    how = {"sampler": "ddim", "num_inference_steps": 5, "noise": torch.zeros_like}
    sample(denoise, OBJECTIVE, X_T, **how, on_step=lambda step, *now: shown.append(now))
    for timestep, x_t, x_0 in shown:
        time = torch.full((4,), timestep)
        raw = OBJECTIVE.predict_x_0(denoise(x_t, time), x_t=x_t, time=time)
        torch.testing.assert_close(x_0, raw.clamp(-1, 1), atol=1e-4, rtol=0)


# A mixture of two classes on the line, whose densities at every noise level are known.
WEIGHTS = torch.tensor([0.3, 0.7], dtype=torch.float64)
MEANS = torch.tensor([-0.5, 0.4], dtype=torch.float64)
VARIANCES = torch.tensor([0.02, 0.05], dtype=torch.float64)
PROCESSES: dict[str, Objective] = {
    "epsilon": discrete("cosine"),
    "v_prediction": discrete("linear", prediction_type="v_prediction"),
    "edm": EDMObjective(),
    "flow": FlowObjective(),
}


def log_joint(objective: Objective, x_t: Tensor, time: Tensor) -> Tensor:
    """log p(x_t, class), (B, 2)."""
    signal, sigma = objective.levels(time, x_t.flatten(1))
    variance = signal**2 * VARIANCES + sigma**2
    return WEIGHTS.log() - (x_t.flatten(1) - signal * MEANS) ** 2 / (2 * variance) - variance.log() / 2


def score_of(log_density: Callable[[Tensor], Tensor], x_t: Tensor) -> Tensor:
    with torch.enable_grad():
        x_t = x_t.detach().requires_grad_()
        return torch.autograd.grad(log_density(x_t).sum(), x_t)[0]


def output_of_score(objective: Objective, score: Tensor, x_t: Tensor, time: Tensor) -> Tensor:
    """Tweedie: signal * E[x_0 | x_t] = x_t + sigma^2 * score."""
    signal, sigma = objective.levels(time, x_t)
    return output_for(objective, x_0=(x_t + sigma**2 * score) / signal, x_t=x_t, time=time)


class Mixture:
    """The best network for the mixture, conditional where the label is 0 or 1, unconditional where it is 2.

    `guide` calls it through the objective; the undone scaling of EDM's input is done again here.
    """

    def __init__(self, objective: Objective) -> None:
        self.objective = objective

    def __call__(self, x: Tensor, told: Tensor, *, label: Tensor) -> Tensor:
        x_t, time = undone(self.objective, x, told)
        joint = score_of(lambda x: torch.logsumexp(log_joint(self.objective, x, time), dim=1), x_t)
        rows = torch.arange(len(x_t))
        single = score_of(lambda x: log_joint(self.objective, x, time)[rows, label.clamp(max=1)], x_t)
        score = torch.where((label == 2).reshape(-1, 1, 1, 1), joint, single)
        return output_of_score(self.objective, score, x_t, time)


def undone(objective: Objective, x: Tensor, told: Tensor) -> tuple[Tensor, Tensor]:
    if isinstance(objective, EDMObjective):
        sigma = (4 * told).exp()
        return x / objective.preconditioning(sigma, x).c_in, sigma
    return (x, told / 1000) if isinstance(objective, FlowObjective) else (x, told)


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("guidance_scale", [0.5, 1.0, 4.0])
def test_the_scale_follows_the_closed_form_on_a_mixture(name, guidance_scale):
    """The guided output is that of the score of p(x_t) p(class | x_t)^scale."""
    objective, label = PROCESSES[name], torch.tensor([0, 1, 1, 0])
    x_t = torch.tensor([-0.7, 0.1, 0.9, 0.3], dtype=torch.float64).reshape(4, 1, 1, 1)
    denoise = guide(objective, Mixture(objective), {"label": label}, {"label": torch.full((4,), 2)}, guidance_scale)
    for time in objective.trajectory(12).times[1:]:
        times = time.expand(4)

        def log_density(x: Tensor, times: Tensor = times) -> Tensor:
            joint = log_joint(objective, x, times)
            class_given_x = joint.log_softmax(dim=1)[torch.arange(4), label]
            return torch.logsumexp(joint, dim=1) + guidance_scale * class_given_x

        expected = output_of_score(objective, score_of(log_density, x_t), x_t, times)
        torch.testing.assert_close(denoise(x_t, times), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", ["epsilon", "v_prediction", "edm"])  # in pure noise, where flow starts, no class shows
@pytest.mark.parametrize("sampler", ["ddim", "dpm_solver_pp", "heun", "euler"])
def test_the_true_classifier_guides_as_the_true_conditional_does(name, sampler):
    """Bayes: s times the classifier's gradient on the unconditional model is classifier-free guidance of scale s."""
    objective, label, scale = PROCESSES[name], torch.tensor([0, 1, 1, 0]), torch.tensor([3.0, 0.0, 1.0, 2.0])
    nothing, x_t = torch.full((4,), 2), torch.randn(4, 1, 1, 1, dtype=torch.float64)
    how = {"sampler": sampler, "num_inference_steps": 12, "noise": torch.zeros_like, "threshold": "none"}
    free = guide(objective, Mixture(objective), {"label": label}, {"label": nothing}, scale)
    plain = guide(objective, Mixture(objective), {"label": nothing}, {}, 1.0)
    of_mixture = lambda x, told: log_joint(objective, *undone(objective, x, told))  # noqa: E731
    score = classifier_score(objective, of_mixture, label, scale)
    expected = sample(free, objective, x_t, **how)
    torch.testing.assert_close(sample(plain, objective, x_t, score=score, **how), expected, rtol=1e-6, atol=1e-8)
    assert (expected - sample(plain, objective, x_t, **how)).abs()[[0, 2, 3]].min() > 1e-4


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_ancestral_sampling_moves_its_mean_by_the_models_variance_times_the_gradient(variance):
    """Dhariwal and Nichol (2021), algorithm 1, in a single step between two levels."""
    objective = discrete("linear", 1000, variance=variance)
    x_t, states = torch.randn(4, 3, 4, 4, dtype=torch.float64), []

    def run(**options: Any) -> Tensor:
        states.clear()
        how = {"sampler": "ddpm", "num_inference_steps": 2, "noise": seeded_noise(x_t.shape)}
        sample(lambda x, t: x.sin(), objective, x_t, on_step=lambda *shown: states.append(shown[2]), **how, **options)
        return states[1]

    step = objective.trajectory(2).step(0)
    moved = run(score=lambda x, t: x.cos()) - run()
    factor = step.posterior_variance if variance == "fixed_small" else step.added_variance
    torch.testing.assert_close(moved, factor * x_t.cos())
