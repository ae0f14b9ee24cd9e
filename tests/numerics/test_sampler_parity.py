"""The samplers are those of diffusers, step by step.

Its float32 tables are replaced by float64 ones, or their cancellation would be all that a comparison shows.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
)
from torch import Tensor

from components.models.diffusion.objective import EDMObjective, FlowObjective
from components.models.diffusion.samplers import sample
from components.models.diffusion.schedule import Trajectory
from components.models.diffusion.steps import spaced_timesteps
from tests.known_denoisers import discrete, seeded_noise, wavy

LINEAR = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 2e-2}
SHAPE = (4, 3, 4, 4)


def in_float64(peer: Any) -> Any:
    peer.alphas_cumprod = (1 - peer.betas.double()).cumprod(0)
    return peer


def start() -> Tensor:
    return torch.randn(SHAPE, dtype=torch.float64)


def chain(peer: Any, x_t: Tensor, denoise: Callable[[Tensor, Tensor], Tensor], **options: Any) -> Tensor:
    """What a peer makes of noise; of its options those that are functions are called with the number of the step."""
    for index, timestep in enumerate(peer.timesteps):
        now = {name: option(index) if callable(option) else option for name, option in options.items()}
        x_t = peer.step(denoise(x_t, timestep.repeat(4)), timestep, x_t, **now).prev_sample
    return x_t.double()


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
@pytest.mark.parametrize("num_inference_steps", [25, 1000])
def test_a_whole_ddpm_chain_equals_that_of_diffusers(variance, num_inference_steps):
    """Strided too, where betas are recomputed and a learned variance lies between the new ones."""
    peer = in_float64(DDPMScheduler(**LINEAR, variance_type=variance, timestep_spacing="leading"))
    peer.set_timesteps(num_inference_steps)
    with_variance = lambda x_t, time: torch.cat([wavy(x_t, time), torch.sin(5 * x_t)], dim=1)  # noqa: E731
    denoise = with_variance if variance == "learned_range" else wavy
    x_t = start()
    theirs = chain(peer, x_t, denoise, generator=torch.Generator().manual_seed(0))
    objective = discrete(variance=variance, loss="hybrid" if variance == "learned_range" else "simple")
    how = {"sampler": "ddpm", "num_inference_steps": num_inference_steps, "spacing": "leading"}
    ours = sample(denoise, objective, x_t, noise=seeded_noise(SHAPE), **how)
    torch.testing.assert_close(ours, theirs, atol=5.5e-4, rtol=0)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_whole_ddim_chain_equals_that_of_diffusers(eta):
    """With the noise derived from the clipped x_0; without (the default of diffusers) the two differ by units."""
    peer = DDIMScheduler(**LINEAR, set_alpha_to_one=True, steps_offset=0, timestep_spacing="leading")
    in_float64(peer).set_timesteps(25)
    x_t = start()
    options = {"eta": eta, "variance_noise": seeded_noise(SHAPE) if eta else None}
    theirs = chain(peer, x_t, wavy, use_clipped_model_output=True, **options)
    how = {"sampler": "ddim", "num_inference_steps": 25, "spacing": "leading", "eta": eta}
    ours = sample(wavy, discrete(), x_t, noise=seeded_noise(SHAPE), **how)
    torch.testing.assert_close(ours, theirs, atol=2.6e-5, rtol=0)


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("num_inference_steps", [50, 200])
def test_a_whole_ddim_chain_of_latent_diffusion_equals_that_of_diffusers(num_inference_steps, eta):
    """Levels 1, 21, …; the last step ends at alphas_cumprod[0], and adds noise like the others."""
    peer = DDIMScheduler(
        **LINEAR, set_alpha_to_one=False, steps_offset=1, timestep_spacing="leading", clip_sample=False
    )
    in_float64(peer).set_timesteps(num_inference_steps)
    peer.final_alpha_cumprod = peer.alphas_cumprod[0]
    x_t = start()
    theirs = chain(peer, x_t, gentle, eta=eta, variance_noise=seeded_noise(SHAPE) if eta else None)
    how = {"sampler": "ddim", "num_inference_steps": num_inference_steps, "spacing": "leading_from_1", "eta": eta}
    ours = sample(gentle, discrete(), x_t, noise=seeded_noise(SHAPE), threshold="none", **how)
    torch.testing.assert_close(ours, theirs, atol=2.6e-5, rtol=0)


def gentle(x_t: Tensor, time: Tensor) -> Tensor:
    """A denoiser that does not amplify what diffusers rounds to float32 in between."""
    return 0.9 * x_t + 0.1 * torch.sin(3 * x_t + time.reshape(-1, 1, 1, 1) / 100)


def none(step: int) -> Tensor:
    raise AssertionError(f"noise asked for at step {step}")


def ratios(trajectory: Trajectory) -> Tensor:  # sigma / signal, (N + 1,)
    return trajectory.sigma / trajectory.signal


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("num_inference_steps", [2, 10, 20])
def test_dpm_solver_pp_equals_that_of_diffusers(prediction_type, num_inference_steps):
    peer = DPMSolverMultistepScheduler(**LINEAR, prediction_type=prediction_type, timestep_spacing="trailing")
    peer.set_timesteps(num_inference_steps)
    objective = discrete(prediction_type=prediction_type)
    trajectory = objective.trajectory(num_inference_steps, spacing="trailing")
    assert trajectory.times.tolist() == peer.timesteps.tolist()
    torch.testing.assert_close(ratios(trajectory).float(), peer.sigmas, atol=0, rtol=1e-4)
    peer.sigmas = ratios(trajectory)
    x_t = start()
    theirs = chain(peer, x_t, gentle)
    how = {"sampler": "dpm_solver_pp", "num_inference_steps": num_inference_steps, "spacing": "trailing"}
    ours = sample(gentle, objective, x_t, noise=none, threshold="none", **how)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


@pytest.mark.parametrize("num_inference_steps", [2, 10, 20])
def test_sde_dpm_solver_pp_equals_that_of_diffusers(num_inference_steps):
    peer = DPMSolverMultistepScheduler(**LINEAR, algorithm_type="sde-dpmsolver++", timestep_spacing="trailing")
    peer.set_timesteps(num_inference_steps)
    objective = discrete()
    peer.sigmas = ratios(objective.trajectory(num_inference_steps, spacing="trailing"))
    x_t = start()
    theirs = chain(peer, x_t, gentle, variance_noise=seeded_noise(SHAPE))  # at the end it is times 0
    how = {"sampler": "sde_dpm_solver_pp", "num_inference_steps": num_inference_steps, "spacing": "trailing"}
    ours = sample(gentle, objective, x_t, noise=seeded_noise(SHAPE), threshold="none", **how)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


@pytest.mark.parametrize("num_inference_steps", [2, 7, 18])
def test_heun_with_karras_levels_equals_that_of_diffusers(num_inference_steps):
    """Theirs works on x_t / signal, and tells its network a time between training steps."""
    peer = HeunDiscreteScheduler(**LINEAR, beta_schedule="linear", use_karras_sigmas=True)
    peer.set_timesteps(num_inference_steps)
    objective = discrete()
    trajectory = objective.trajectory(num_inference_steps, spacing="karras")
    times, levels = trajectory.times, ratios(trajectory)
    twice = torch.cat([times[:1], times[1:].repeat_interleave(2)])
    torch.testing.assert_close(twice.float(), peer.timesteps, atol=2e-2, rtol=1e-4)
    interleaved = torch.cat([levels[:1], levels[1:-1].repeat_interleave(2), levels[-1:]])
    torch.testing.assert_close(interleaved.float(), peer.sigmas, atol=0, rtol=1e-4)
    peer.sigmas = interleaved
    x_t = start()
    theirs = x_t / trajectory.signal[0]
    for timestep, time in zip(peer.timesteps, twice, strict=True):
        epsilon = wavy(peer.scale_model_input(theirs, timestep), time.repeat(4))
        theirs = peer.step(epsilon, timestep, theirs).prev_sample
    how = {"sampler": "heun", "num_inference_steps": num_inference_steps, "threshold": "none"}
    torch.testing.assert_close(sample(wavy, objective, x_t, noise=none, **how), theirs, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("sampler", "scheduler"), [("euler", EDMEulerScheduler), ("dpm_solver_pp", EDMDPMSolverMultistepScheduler)]
)
@pytest.mark.parametrize("num_inference_steps", [2, 18])
def test_edm_sampling_equals_that_of_diffusers(sampler, scheduler, num_inference_steps):
    peer = scheduler()
    peer.set_timesteps(num_inference_steps)
    objective = EDMObjective()
    trajectory = objective.trajectory(num_inference_steps)
    torch.testing.assert_close(trajectory.sigma.float(), peer.sigmas, atol=0, rtol=1e-5)
    peer.sigmas = trajectory.sigma
    x_t = start()
    theirs = trajectory.initial_scale * x_t
    assert trajectory.initial_scale == pytest.approx(float(peer.init_noise_sigma))
    for timestep, sigma in zip(peer.timesteps, trajectory.times, strict=True):
        output = wavy(peer.scale_model_input(theirs, timestep), (sigma.log() / 4).repeat(4))
        theirs = peer.step(output, timestep, theirs).prev_sample
    how = {"sampler": sampler, "num_inference_steps": num_inference_steps, "threshold": "none"}
    ours = sample(lambda x, t: objective.apply(wavy, x, t), objective, x_t, noise=none, **how)
    torch.testing.assert_close(ours, theirs.double(), atol=5e-5, rtol=0)


def test_euler_on_a_straight_path_equals_that_of_diffusers():
    peer, objective = FlowMatchEulerDiscreteScheduler(), FlowObjective()
    peer.set_timesteps(sigmas=torch.linspace(1, 0.1, 10).tolist())
    x_t = start()
    theirs = chain(peer, x_t, lambda x, t: wavy(x, t.double()))
    how = {"sampler": "euler", "num_inference_steps": 10, "threshold": "none"}
    ours = sample(lambda x, t: objective.apply(wavy, x, t), objective, x_t, noise=none, **how)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing", "leading_from_1"])
@pytest.mark.parametrize("num_inference_steps", [1, 2, 7, 50, 300, 999])
def test_steps_are_spaced_as_diffusers_spaces_them(spacing, num_inference_steps):
    """Those of latent diffusion begin at 1."""
    kind, _, offset = spacing.partition("_from_")
    peer = DDIMScheduler(1000, timestep_spacing=kind, steps_offset=int(offset or 0))
    peer.set_timesteps(num_inference_steps)
    # Of one step theirs is step 0, which no noise ends at.
    expected = [999] if (spacing, num_inference_steps) == ("linspace", 1) else peer.timesteps.tolist()[::-1]
    assert spaced_timesteps(1000, num_inference_steps, spacing=spacing) == expected


@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
def test_all_steps_are_all_whatever_their_spacing(spacing):
    assert spaced_timesteps(1000, 1000, spacing=spacing) == list(range(1000))


def test_dynamic_thresholding_equals_that_of_diffusers():
    peer = DDPMScheduler(**LINEAR, thresholding=True, dynamic_thresholding_ratio=0.9, sample_max_value=1e6)
    in_float64(peer).set_timesteps(20)
    x_t = start()
    theirs = chain(peer, x_t, wavy, generator=torch.Generator().manual_seed(0))
    how = {"sampler": "ddpm", "num_inference_steps": 20, "spacing": "leading", "threshold": "dynamic"}
    ours = sample(wavy, discrete(), x_t, noise=seeded_noise(SHAPE), percentile=0.9, **how)
    torch.testing.assert_close(ours, theirs, atol=5.5e-4, rtol=0)
