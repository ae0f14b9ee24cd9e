"""Laws of the samplers: equal to diffusers step by step, and exact on data whose best denoiser is known."""

from collections.abc import Callable

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor

from components.diffusion.samplers import ddim_step, ddpm_step, sample, spaced_timesteps
from components.diffusion.schedule import Schedule, make_schedule

LINEAR = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 2e-2, "clip_sample": True}
MODES = [("ddpm", 0.0), ("ddim", 0.0), ("ddim", 0.5), ("ddim", 1.0)]


def seeded_noise(shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float32) -> Callable[[int], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda step: torch.randn(shape, generator=generator, dtype=dtype)


def wavy(x_t: Tensor, timesteps: Tensor) -> Tensor:
    """A denoiser that is nobody's best, so that clipping matters; each sample is on its own."""
    return 1.5 * torch.sin(3 * x_t + timesteps.reshape(-1, 1, 1, 1) / 100)


def in_float64(peer: DDPMScheduler | DDIMScheduler) -> DDPMScheduler | DDIMScheduler:
    """Its own tables are float32, whose cancellation in 1 - alphas_cumprod would be all that a comparison shows."""
    peer.alphas_cumprod = (1 - peer.betas.double()).cumprod(0)
    return peer


@pytest.mark.parametrize("index", [0, 1, 2, 500, 999])
def test_a_ddpm_step_equals_that_of_diffusers(index):
    schedule = make_schedule("linear", num_train_timesteps=1000)
    epsilon, x_t = torch.randn(2, 4, 3, 4, 4, dtype=torch.float64).unbind()
    noise = seeded_noise(x_t.shape, dtype=torch.float64)(0) if index else None
    indices = torch.full((4,), index)
    signal, sigma = schedule.signal_and_noise(indices, x_t)
    x_0 = ((x_t - sigma * epsilon) / signal).clamp(-1, 1)
    ours = ddpm_step(schedule, x_0=x_0, x_t=x_t, indices=indices, noise=noise)
    peer = in_float64(DDPMScheduler(**LINEAR, variance_type="fixed_small"))
    theirs = peer.step(epsilon, index, x_t, generator=torch.Generator().manual_seed(0)).prev_sample
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


def ddim_of_diffusers(num_inference_steps: int) -> DDIMScheduler:
    peer = DDIMScheduler(**LINEAR, set_alpha_to_one=True, steps_offset=0, timestep_spacing="leading")
    peer.set_timesteps(num_inference_steps)
    return in_float64(peer)


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("index", [0, 1, 12, 24])
def test_a_ddim_step_equals_that_of_diffusers(index, eta):
    """With the noise derived from the clipped x_0; without (the default of diffusers) the two differ by units."""
    peer = ddim_of_diffusers(25)
    strided = make_schedule("linear", num_train_timesteps=1000).respaced(list(range(0, 1000, 40)))
    epsilon, x_t, noise = torch.randn(3, 4, 3, 4, 4, dtype=torch.float64).unbind()
    indices = torch.full((4,), index)
    signal, sigma = strided.signal_and_noise(indices, x_t)
    x_0 = ((x_t - sigma * epsilon) / signal).clamp(-1, 1)
    ours = ddim_step(strided, x_0=x_0, x_t=x_t, indices=indices, noise=noise, eta=eta)
    options = {"eta": eta, "use_clipped_model_output": True, "variance_noise": noise if eta else None}
    theirs = peer.step(epsilon, 40 * index, x_t, **options).prev_sample
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_whole_ddim_chain_equals_that_of_diffusers(eta):
    peer = ddim_of_diffusers(25)
    strided = make_schedule("linear", num_train_timesteps=1000).respaced(list(range(0, 1000, 40)))
    x_t = theirs = torch.randn(4, 3, 4, 4, dtype=torch.float64)
    noise = seeded_noise(x_t.shape, dtype=torch.float64)
    for timestep in peer.timesteps:
        options = {"eta": eta, "use_clipped_model_output": True, "variance_noise": noise(0) if eta else None}
        theirs = peer.step(wavy(theirs, timestep.repeat(4)), timestep, theirs, **options).prev_sample
    ours = sample(
        wavy,
        strided,
        x_t,
        prediction_type="epsilon",
        sampler="ddim",
        num_inference_steps=25,
        eta=eta,
        noise=seeded_noise(x_t.shape, dtype=torch.float64),
    )
    torch.testing.assert_close(ours, theirs, atol=2.6e-5, rtol=0)


def best_denoiser(schedule: Schedule, mean: Tensor, covariance: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """E[x_0 | x_t] of Gaussian data, in closed form; pictures are (B, 1, 1, 2)."""

    def denoise(x_t: Tensor, timesteps: Tensor) -> Tensor:
        signal2 = schedule.alphas_cumprod[timesteps[0]]
        of_x_t = signal2 * covariance + (1 - signal2) * torch.eye(2, dtype=torch.float64)
        gain = signal2.sqrt() * covariance @ of_x_t.inverse()
        centered = x_t.flatten(1) - signal2.sqrt() * mean
        return (mean + centered @ gain.T).reshape(x_t.shape)

    return denoise


def moments(
    schedule: Schedule, num_inference_steps: int, mean: Tensor, covariance: Tensor, **how
) -> tuple[Tensor, Tensor]:
    """Mean and covariance that a chain produces, exactly: it is affine, so unit noises one at a time are enough.

    Row 0 of the batch gets no noise at all; every other row one unit vector, in x_T or at one step.
    """
    sources = 2 * num_inference_steps
    units = torch.eye(sources, dtype=torch.float64).reshape(num_inference_steps, 2, sources).mT
    rows = torch.cat([torch.zeros(num_inference_steps, 1, 2, dtype=torch.float64), units], dim=1)
    rows = rows.reshape(num_inference_steps, sources + 1, 1, 1, 2)
    generated = sample(
        best_denoiser(schedule, mean, covariance),
        schedule,
        rows[0],
        prediction_type="sample",
        num_inference_steps=num_inference_steps,
        noise=lambda step: rows[step + 1],
        **how,
    ).flatten(1)
    response = generated[1:] - generated[0]
    return generated[0], response.T @ response


@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize(("sampler", "eta"), MODES)
def test_the_best_denoiser_of_gaussian_data_recovers_their_mean_and_covariance(name, sampler, eta):
    """What is missing at a finite number of steps is of first order: it halves when they double."""
    mean = torch.tensor([0.2, -0.3], dtype=torch.float64)
    covariance = torch.tensor([[0.04, 0.02], [0.02, 0.05]], dtype=torch.float64)
    schedule = make_schedule(name, num_train_timesteps=1000)
    coarse_mean, coarse = moments(schedule, 250, mean, covariance, sampler=sampler, eta=eta)
    fine_mean, fine = moments(schedule, 500, mean, covariance, sampler=sampler, eta=eta)
    torch.testing.assert_close(torch.stack([coarse_mean, fine_mean]), mean.expand(2, 2), atol=5e-4, rtol=0)
    assert 1.7 < ((coarse - covariance).norm() / (fine - covariance).norm()).item() < 2.1
    torch.testing.assert_close(2 * fine - coarse, covariance, atol=1e-3, rtol=0)


@pytest.mark.parametrize(("sampler", "eta"), MODES)
def test_all_steps_strided_are_the_plain_chain(sampler, eta):
    schedule = make_schedule("cosine", num_train_timesteps=30)
    x_t = plain = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    noise = seeded_noise(x_t.shape, dtype=torch.float64)
    for index in reversed(range(30)):
        indices = torch.full((2,), index)
        x_0 = wavy(plain, indices).clamp(-1, 1)
        random = noise(0) if index > 0 and (sampler == "ddpm" or eta > 0) else None
        if sampler == "ddpm":
            plain = ddpm_step(schedule, x_0=x_0, x_t=plain, indices=indices, noise=random)
        else:
            plain = ddim_step(schedule, x_0=x_0, x_t=plain, indices=indices, noise=random, eta=eta)
    strided = sample(
        wavy,
        schedule,
        x_t,
        prediction_type="sample",
        sampler=sampler,
        num_inference_steps=30,
        eta=eta,
        noise=seeded_noise(x_t.shape, dtype=torch.float64),
    )
    torch.testing.assert_close(strided, plain)


def run(sampler: str, *, eta: float = 0.0, num_inference_steps: int = 10, **changes) -> Tensor:
    arguments = {
        "x_t": torch.randn((4, 3, 4, 4), generator=torch.Generator().manual_seed(5), dtype=torch.float64),
        "prediction_type": "v_prediction",
        "noise": seeded_noise((4, 3, 4, 4), dtype=torch.float64),
    }
    schedule = make_schedule("cosine", num_train_timesteps=100)
    arguments |= {"sampler": sampler, "eta": eta, "num_inference_steps": num_inference_steps} | changes
    return sample(arguments.pop("denoise", wavy), schedule, arguments.pop("x_t"), **arguments)


def test_ddim_at_eta_1_is_ddpm():
    torch.testing.assert_close(run("ddim", eta=1.0), run("ddpm"))


def test_ddim_at_eta_0_asks_for_no_noise_and_no_sampler_asks_at_the_last_step():
    def asked(sampler: str) -> list[int]:
        steps = []
        run(sampler, noise=lambda step: steps.append(step) or torch.zeros(4, 3, 4, 4))
        return steps

    assert asked("ddim") == []
    assert asked("ddpm") == list(range(9))


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_the_network_sees_original_timesteps_from_the_last_to_the_first(sampler):
    seen = []
    run(sampler, num_inference_steps=4, denoise=lambda x_t, t: seen.append(t.tolist()) or wavy(x_t, t))
    assert seen == [[99] * 4, [66] * 4, [33] * 4, [0] * 4]


def test_on_step_shows_each_x_t_with_the_clipped_image_that_was_predicted_from_it():
    shown = []
    result = run("ddpm", on_step=lambda *arguments: shown.append(arguments), num_inference_steps=4)
    assert [(step, timestep) for step, timestep, _, _ in shown] == [(0, 99), (1, 66), (2, 33), (3, 0)]
    assert all(x_0.abs().max() <= 1 for _, _, _, x_0 in shown)
    torch.testing.assert_close(result, shown[-1][3])


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_a_wild_denoiser_cannot_leave_the_range_of_pictures(sampler):
    assert run(sampler, denoise=lambda x_t, t: 1e4 * torch.ones_like(x_t)).abs().max() <= 1 + 1e-12


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_a_sample_depends_on_its_own_noise_and_not_on_its_batch(sampler):
    x_t, steps = torch.randn(4, 3, 4, 4, dtype=torch.float64), torch.randn(10, 4, 3, 4, 4, dtype=torch.float64)
    together = run(sampler, x_t=x_t, noise=lambda step: steps[step])
    for i in range(4):
        alone = run(sampler, x_t=x_t[i : i + 1], noise=lambda step, i=i: steps[step, i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone)


def test_evenly_spread_steps_keep_both_ends():
    spaced = spaced_timesteps(1000, 250)
    assert spaced[:3] + spaced[-2:] == [0, 4, 8, 995, 999]
    assert len(set(spaced)) == 250
    assert spaced_timesteps(1000, 1000) == list(range(1000))
    assert spaced_timesteps(1000, 1) == [999]


@pytest.mark.parametrize(
    "change",
    [{"num_inference_steps": 0}, {"num_inference_steps": 101}, {"eta": 1.5}, {"eta": -0.1}, {"sampler": "euler"}],
)
def test_what_cannot_be_sampled_is_refused(change):
    with pytest.raises(ValueError, match=r"must be in|unknown sampler"):
        run(**({"sampler": "ddim"} | change))
