"""Laws of the samplers: exact on data whose best denoiser is known, and what they ask their network and noise for."""

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from components.models.diffusion.objective import EDMObjective, FlowObjective, Objective
from components.models.diffusion.samplers import Known, Start, quantile, sample
from components.models.diffusion.schedule import with_clean_end
from components.models.diffusion.steps import SAMPLERS, ddim_step, ddpm_step, spaced_timesteps
from tests.known_denoisers import best_denoiser, discrete, moments, output_for, respaced, seeded_noise, wavy

MODES = [("ddpm", 0.0), ("ddim", 0.0), ("ddim", 0.5), ("ddim", 1.0)]
DRAWING = tuple(name for name, kind in SAMPLERS.items() if kind.own_eta)  # noise in every step
SHAPE = (4, 3, 4, 4)
MEAN = torch.tensor([0.2, -0.3], dtype=torch.float64)
COVARIANCE = torch.tensor([[0.04, 0.02], [0.02, 0.05]], dtype=torch.float64)


@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize(("sampler", "eta"), MODES)
def test_the_best_denoiser_of_gaussian_data_recovers_their_mean_and_covariance(name, sampler, eta):
    """What is missing at a finite number of steps is of first order: it halves when they double."""
    objective = discrete(name, prediction_type="sample")
    how = {"sampler": sampler, "eta": eta, "draws": sampler == "ddpm" or eta > 0}
    coarse_mean, coarse = moments(objective, 250, MEAN, COVARIANCE, **how)
    fine_mean, fine = moments(objective, 500, MEAN, COVARIANCE, **how)
    torch.testing.assert_close(torch.stack([coarse_mean, fine_mean]), MEAN.expand(2, 2), atol=5e-4, rtol=0)
    assert 1.7 < ((coarse - COVARIANCE).norm() / (fine - COVARIANCE).norm()).item() < 2.1
    torch.testing.assert_close(2 * fine - coarse, COVARIANCE, atol=1e-3, rtol=0)


PROCESSES: dict[str, Objective] = {
    "linear": discrete("linear"),
    "cosine": discrete("cosine", prediction_type="v_prediction"),
    "zero_terminal_snr": discrete("scaled_linear", prediction_type="v_prediction", zero_terminal_snr=True),
    "edm": EDMObjective(),
    "flow": FlowObjective(),
}
SMOOTH = ("linear", "cosine", "edm")  # where log(signal / sigma) is finite until the last step


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_recovers_gaussian_data_from_every_process(process, sampler):
    mean, covariance = moments(PROCESSES[process], 300, MEAN, COVARIANCE, sampler=sampler, draws=sampler in DRAWING)
    torch.testing.assert_close(mean, MEAN, atol=2e-3, rtol=0)
    torch.testing.assert_close(covariance, COVARIANCE, atol=1e-2 if sampler == "ddpm" else 4e-3, rtol=0)


@pytest.mark.parametrize(
    ("process", "sampler"),
    [
        *((process, "heun") for process in PROCESSES),
        *((process, solver) for process in SMOOTH for solver in ("dpm_solver_pp", "sde_dpm_solver_pp")),
    ],
)
def test_the_solvers_of_second_order_are_of_second_order(process, sampler):
    """Twice the steps, about a quarter of what is missing; steps are compared among themselves, the ends aside."""

    def spread(steps: int) -> Tensor:
        return moments(PROCESSES[process], steps, MEAN, COVARIANCE, sampler=sampler, draws=sampler in DRAWING)[1]

    coarse, middle, fine = spread(80), spread(160), spread(320)
    assert 2.7 < ((coarse - middle).norm() / (middle - fine).norm()).item() < 6


@pytest.mark.parametrize("process", SMOOTH)
@pytest.mark.parametrize(
    ("solver", "other", "share"), [("dpm_solver_pp", "ddim", 0.6), ("sde_dpm_solver_pp", "ddpm", 0.65)]
)
def test_ten_to_fifteen_steps_of_a_solver_miss_less_than_as_many_of_first_order(process, solver, other, share):
    for steps in (10, 15):
        second, first = (
            moments(PROCESSES[process], steps, MEAN, COVARIANCE, sampler=sampler, draws=sampler in DRAWING)[1]
            for sampler in (solver, other)
        )
        assert (second - COVARIANCE).norm() < share * (first - COVARIANCE).norm()


@pytest.mark.parametrize(("sampler", "eta"), MODES)
def test_all_steps_strided_are_the_plain_chain(sampler, eta):
    objective = discrete("cosine", 30, prediction_type="sample")
    x_t = plain = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    noise = seeded_noise(x_t.shape)
    schedule = objective.schedule
    for index in reversed(range(30)):
        indices = torch.full((2,), index)
        x_0 = wavy(plain, indices).clamp(-1, 1)
        mean, log_variance = schedule.posterior(x_0, plain, indices)
        random = noise(0) if index > 0 and (sampler == "ddpm" or eta > 0) else torch.zeros_like(plain)
        if sampler == "ddpm":
            plain = mean + (0.5 * log_variance).exp() * random
        else:
            step = objective.trajectory(30).step(29 - index)
            plain = ddim_step(step, x_t=plain, x_0=x_0, noise=random, eta=eta)
    how = {"sampler": sampler, "num_inference_steps": 30, "eta": eta}
    torch.testing.assert_close(sample(wavy, objective, x_t, noise=seeded_noise(x_t.shape), **how), plain)


@pytest.mark.parametrize("indices", [list(range(40)), [0, 3, 11, 39]])
def test_a_step_of_a_trajectory_is_the_posterior_of_the_respaced_schedule(indices):
    schedule = respaced(discrete("linear", 40).schedule, indices)
    alphas_cumprod = schedule.alphas_cumprod.flip(0)
    trajectory = with_clean_end(torch.tensor(indices).flip(0), alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt())
    x_0, x_t = torch.randn(2, 1, 3, 2, 2, dtype=torch.float64).unbind()
    for index in range(len(indices)):
        time, step = torch.tensor([len(indices) - 1 - index]), trajectory.step(index)
        torch.testing.assert_close(ddpm_step(step, x_t=x_t, x_0=x_0), schedule.posterior(x_0, x_t, time)[0])
        assert step.added_variance == pytest.approx(schedule.betas[time].item(), rel=1e-9)
        assert step.posterior_variance == pytest.approx(schedule.tables["posterior_variance"][time].item(), rel=1e-9)


def run(sampler: str, *, eta: float = 0.0, num_inference_steps: int = 10, **changes: Any) -> Tensor:
    arguments: dict[str, Any] = {
        "x_t": torch.randn(SHAPE, generator=torch.Generator().manual_seed(5), dtype=torch.float64),
        "objective": discrete("cosine", 100, prediction_type="v_prediction"),
        "noise": seeded_noise(SHAPE),
    }
    arguments |= {"sampler": sampler, "eta": eta, "num_inference_steps": num_inference_steps} | changes
    denoise, objective, x_t = arguments.pop("denoise", wavy), arguments.pop("objective"), arguments.pop("x_t")
    return sample(denoise, objective, x_t, **arguments)


def test_ddim_is_ddpm_at_eta_1_and_euler_at_eta_0_and_solvers_start_and_end_as_they_do():
    torch.testing.assert_close(run("ddim", eta=1.0), run("ddpm"))
    assert torch.equal(run("sde_dpm_solver_pp", num_inference_steps=1), run("dpm_solver_pp", num_inference_steps=1))
    ancestral = run("ddpm", num_inference_steps=2, spacing="karras")
    torch.testing.assert_close(run("sde_dpm_solver_pp", num_inference_steps=2), ancestral)
    torch.testing.assert_close(run("euler", spacing="linspace"), run("ddim"))
    for steps in (1, 2):
        shown: dict[str, list[Tensor]] = {"ddim": [], "dpm_solver_pp": []}
        for sampler, states in shown.items():
            on_step = lambda *shown, s=states: s.append(shown[2])  # noqa: E731
            run(sampler, num_inference_steps=steps, spacing="linspace", on_step=on_step)
        torch.testing.assert_close(shown["ddim"], shown["dpm_solver_pp"])


def test_only_samplers_that_draw_ask_for_noise_and_none_asks_at_the_last_step():
    def asked(sampler: str, eta: float = 0.0) -> list[int]:
        steps: list[int] = []
        run(sampler, eta=eta, noise=lambda step: steps.append(step) or torch.zeros(SHAPE))
        return steps

    assert all(asked(sampler) == [] for sampler in ("ddim", "dpm_solver_pp", "heun", "euler"))
    assert asked("ddpm") == asked("sde_dpm_solver_pp") == asked("ddim", eta=0.1) == list(range(9))


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm_solver_pp"])
def test_the_network_sees_original_timesteps_from_the_last_to_the_first(sampler):
    seen = []
    denoise = lambda x_t, t: seen.append(t.tolist()) or wavy(x_t, t)  # noqa: E731
    run(sampler, num_inference_steps=4, spacing="linspace", denoise=denoise)
    assert seen == [[99] * 4, [66] * 4, [33] * 4, [0] * 4]


def test_heun_looks_twice_in_every_step_but_the_last_at_levels_between_training_steps():
    seen = []
    run("heun", num_inference_steps=4, denoise=lambda x_t, t: seen.append(t[0].item()) or wavy(x_t, t))
    assert len(seen) == 7
    assert seen[1:] == sorted(seen[1:], reverse=True)
    assert seen[1::2] == seen[2::2]
    assert seen[-1] == 0
    assert any(time != int(time) for time in seen)


def test_on_step_shows_each_x_t_with_the_clipped_image_that_was_predicted_from_it():
    shown = []
    result = run("ddpm", on_step=lambda *arguments: shown.append(arguments), num_inference_steps=4)
    assert [(step, timestep) for step, timestep, _, _ in shown] == [(0, 99), (1, 66), (2, 33), (3, 0)]
    assert all(x_0.abs().max() <= 1 for _, _, _, x_0 in shown)
    torch.testing.assert_close(result, shown[-1][3])


@pytest.mark.parametrize("threshold", ["static", "dynamic"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_wild_denoiser_cannot_leave_the_range_of_images(sampler, threshold):
    wild = run(sampler, denoise=lambda x_t, t: 1e4 * torch.sin(x_t + 1), threshold=threshold)
    assert wild.abs().max() <= 1 + 1e-6


def test_dynamic_thresholding_scales_a_image_by_its_own_quantile_and_none_leaves_latents_alone():
    x_0 = torch.tensor([[-4.0, 0.0, 1.0, 2.0], [-0.5, 0.0, 0.1, 1.0]], dtype=torch.float64).reshape(2, 1, 1, 4)
    objective = discrete("cosine", 100, prediction_type="sample")
    how = {"sampler": "ddim", "num_inference_steps": 1, "noise": None}
    at = partial(sample, lambda x_t, t: x_0, objective, torch.randn_like(x_0), **how)
    by_quantile = at(threshold="dynamic", percentile=1.0).flatten(1)
    torch.testing.assert_close(by_quantile, x_0.flatten(1) / torch.tensor([[4.0], [1.0]], dtype=torch.float64))
    torch.testing.assert_close(at(threshold="none"), x_0)
    torch.testing.assert_close(at(threshold="static"), x_0.clamp(-1, 1))


@pytest.mark.parametrize("shape", [(2, 7), (3, 48_000), (1, 2**24 + 5)])
@pytest.mark.parametrize("share", [0.3, 0.995, 1.0])
def test_a_quantile_equals_that_of_numpy_for_images_of_every_size(shape: tuple[int, int], share: float):
    """More values than `torch.quantile` takes too, where a place in float32 is no whole number."""
    values = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    expected = torch.from_numpy(np.quantile(values.numpy(), share, axis=1))
    torch.testing.assert_close(quantile(values, share), expected.float(), rtol=1e-7, atol=0)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("threshold", ["static", "dynamic", "none"])
def test_a_sample_depends_on_its_own_noise_and_not_on_its_batch(sampler, threshold):
    x_t, steps = torch.randn(SHAPE, dtype=torch.float64), torch.randn(10, *SHAPE, dtype=torch.float64)
    together = run(sampler, x_t=x_t, noise=lambda step: steps[step], threshold=threshold)
    for i in range(4):
        noise = lambda step, i=i: steps[step, i : i + 1]  # noqa: E731
        alone = run(sampler, x_t=x_t[i : i + 1], noise=noise, threshold=threshold)
        torch.testing.assert_close(together[i : i + 1], alone)


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_what_is_known_stays_and_is_noised_to_each_level(process, sampler):
    objective = PROCESSES[process]
    image, noise = torch.rand(2, *SHAPE, dtype=torch.float64).unbind()
    mask = torch.zeros(4, 1, 4, 4, dtype=torch.bool)
    mask[:, :, :2] = True
    seen = []

    def denoise(x_t: Tensor, time: Tensor) -> Tensor:
        seen.append((x_t, time))
        return output_for(objective, x_0=torch.zeros_like(x_t), x_t=x_t, time=time)

    how = {"sampler": sampler, "num_inference_steps": 5, "noise": seeded_noise(SHAPE)}
    made = sample(denoise, objective, torch.randn(SHAPE).double(), known=Known(image, mask, noise), **how)
    torch.testing.assert_close(made[:, :, :2], image[:, :, :2])
    assert made[:, :, 2:].abs().max() < 1e-6
    firsts = seen[:1] + seen[2::2] if sampler == "heun" else seen  # its second look has what Euler's step left there
    for x_t, time in firsts:
        torch.testing.assert_close(x_t[:, :, :2], objective.add_noise(image, noise, time)[:, :, :2])


def test_what_is_known_pulls_the_rest_with_it():
    """Of two nearly equal numbers one is given: the other follows it, within what plain replacement can."""
    covariance = torch.tensor([[0.25, 0.24], [0.24, 0.25]], dtype=torch.float64)
    objective = discrete("cosine")
    denoise = best_denoiser(objective, torch.zeros(2, dtype=torch.float64), covariance)
    shape = (256, 1, 1, 2)
    image = torch.full(shape, 0.8, dtype=torch.float64)
    mask = torch.tensor([True, False]).expand(256, 1, 1, 2)
    known = Known(image, mask, seeded_noise(shape, 1)(0))
    how = {"sampler": "ddpm", "num_inference_steps": 250, "noise": seeded_noise(shape), "threshold": "none"}
    free = sample(denoise, objective, seeded_noise(shape, 2)(0), **how)
    how |= {"noise": seeded_noise(shape)}
    pulled = sample(denoise, objective, seeded_noise(shape, 2)(0), known=known, **how)
    assert free[..., 1].mean().abs() < 0.1
    assert 0.6 < pulled[..., 1].mean() < 0.85


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("sampler", ["ddim", "euler", "heun"])
def test_the_last_steps_from_an_image_are_those_of_the_whole_way_through_what_it_is_noised_to(process, sampler):
    objective, image, seen = PROCESSES[process], seeded_noise(SHAPE, seed=4)(0), list[Tensor]()
    options: dict[str, Any] = {"sampler": sampler, "num_inference_steps": 10, "noise": seeded_noise(SHAPE)}
    x_T = seeded_noise(SHAPE, seed=3)(0)  # noqa: N806
    whole = sample(wavy, objective, x_T, on_step=lambda index, time, x_t, x_0: seen.append(x_t), **options)
    spacing = "linspace" if sampler == "ddim" else "karras"
    first = objective.trajectory(10, spacing=spacing).step(6)
    noise = (seen[6] - first.signal * image) / first.sigma
    torch.testing.assert_close(sample(wavy, objective, noise, start=Start(image, steps=4), **options), whole)


@pytest.mark.parametrize("process", PROCESSES)
def test_the_later_sampling_starts_the_nearer_is_it_to_the_image_that_it_starts_from(process):
    denoise = best_denoiser(PROCESSES[process], MEAN, COVARIANCE)
    image = torch.tensor([0.7, 0.5], dtype=torch.float64).expand(500, 1, 1, 2)
    options: dict[str, Any] = {"sampler": "ddpm", "num_inference_steps": 20, "noise": seeded_noise((500, 1, 1, 2))}
    x_T = seeded_noise((500, 1, 1, 2), seed=3)(0)  # noqa: N806
    misses = [
        (sample(denoise, PROCESSES[process], x_T, start=Start(image, steps), **options) - image).square().mean().item()
        for steps in (1, 5, 20)
    ]
    assert misses == sorted(misses)
    assert misses[0] < 0.1 * misses[2]


def test_sections_have_their_counts_and_places_are_sums_of_the_stride():
    """The example of openai/guided-diffusion's `space_timesteps`; GLIDE's sections; a place that a sum rounds down."""
    thirds = spaced_timesteps(300, 45, spacing="10,15,20")
    assert [sum(low <= step < low + 100 for step in thirds) for low in (0, 100, 200)] == [10, 15, 20]
    assert (thirds[9], thirds[10], thirds[24], thirds[25], thirds[-1]) == (99, 100, 199, 200, 299)
    fast = [0, 22, 44, 66, 88, 111, 133, 155, 177, 199, 200, 222, 244, 266, 288, 311, 333, 355, 377, 399]
    assert spaced_timesteps(1000, 27, spacing="10,10,3,2,2") == [*fast, 400, 500, 599, 600, 799, 800, 999]
    assert spaced_timesteps(10, 3, spacing="2,1") == [0, 4, 5]
    (place,) = {*spaced_timesteps(1000, 21, spacing="21")} - {*spaced_timesteps(1000, 21)}
    assert place == round(sum([999 / 20] * 10)) == 499
    assert spaced_timesteps(1000, 3, spacing=(997, 0, 500)) == [0, 500, 997]


@pytest.mark.parametrize(
    ("steps", "spacing", "words"),
    [
        (27, "10,10,3", "has 23 steps, num_inference_steps is 27"),
        (2, (5, 5), r"\[5, 5\] names a step twice"),
        (3, (0, 20, 20, 49), "names a step twice"),
        (2, (0, 100), "must hold steps in .0, 99., not 0 to 100"),
        (7, "even", "unknown spacing 'even': choose linspace"),
        (60, "60,0", "a section of 50 training steps, which can't be 60 steps"),
        (100, "leading_from_1", "takes fewer than all 100 steps"),
    ],
)
def test_a_spacing_that_the_steps_do_not_have_is_refused(steps: int, spacing: Any, words: str):
    with pytest.raises(ValueError, match=words):
        run("ddim", num_inference_steps=steps, spacing=spacing)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_last_step_ends_at_the_first_one_of_training_where_the_spacing_says_so(sampler):
    """A sampler of second order looks there too, at time 0."""
    seen: list[float] = []
    objective, x_0 = discrete("cosine", 100), torch.full(SHAPE, 0.3, dtype=torch.float64)

    def denoise(x_t: Tensor, time: Tensor) -> Tensor:
        seen.append(time[0].item())
        return output_for(objective, x_0=x_0, x_t=x_t, time=time)

    how = {"sampler": sampler, "num_inference_steps": 4, "spacing": "leading_from_1", "noise": seeded_noise(SHAPE)}
    found = sample(denoise, objective, seeded_noise(SHAPE, seed=1)(0), **how)
    assert [*dict.fromkeys(seen)] == ([76, 51, 26, 1, 0] if sampler == "heun" else [76, 51, 26, 1])
    left = (found - objective.schedule.tables["signal"][0] * x_0) / objective.schedule.tables["sigma"][0]
    assert 0.3 < left.std().item() < 1.7


def test_without_terminal_signal_sampling_starts_at_the_last_step():
    objective = discrete("cosine", 100, prediction_type="v_prediction", zero_terminal_snr=True)
    for spacing in ("linspace", "trailing", "karras"):
        for steps in (1, 2, 10):
            trajectory = objective.trajectory(steps, spacing=spacing)
            assert trajectory.times[0] == 99
            assert len(trajectory) == steps
            assert (trajectory.signal[0], trajectory.sigma[0]) == (0, 1)
            assert (trajectory.sigma[1:].diff() < 0).all()
    with pytest.raises(ValueError, match="leading skips the last step"):
        objective.trajectory(10, spacing="leading")


def test_a_schedule_of_one_step_has_one_trajectory():
    """Between steps there is nothing to interpolate."""
    objective = discrete("cosine", 1)
    for spacing in ("linspace", "trailing", "karras"):
        trajectory = objective.trajectory(1, spacing=spacing)
        assert trajectory.times.tolist() == [0]
        assert (trajectory.signal**2 + trajectory.sigma**2).tolist() == pytest.approx([1, 1])


WRONG = {"num_inference_steps": (0, 101), "eta": (1.5, -0.1), "sampler": ("plms",), "percentile": (0.0, 1.1)}
NO_STEPS = [
    {"objective": objective, "sampler": sampler, "num_inference_steps": 0}
    for objective in (EDMObjective(), FlowObjective())
    for sampler in ("heun", "euler", "ddim")
]


@pytest.mark.parametrize("change", [*({name: value} for name, values in WRONG.items() for value in values), *NO_STEPS])
def test_what_cannot_be_sampled_is_refused(change):
    with pytest.raises(ValueError, match=r"must be|unknown sampler"):
        run(**({"sampler": "ddim"} | change))
