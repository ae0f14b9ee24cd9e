"""The diffusion road's stages: base and upsamplers, in fp32, each picture with its own random stream.

Shapes: B pictures, H = W resolution. Images are float32 (B, 3, H, W) in [-1, 1].
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from components.diffusion.corruption import augment_low_res, quantize_8_bit, upsample
from components.diffusion.guidance import guide
from components.diffusion.objective import Objective, make_objective
from components.diffusion.samplers import OnStep, sample
from components.diffusion.schedule import make_schedule
from components.sampling.model import SamplingModel, asked_or_set, encode_conditions
from components.sampling.requests import Request, random_stream


def sample_base(model: SamplingModel, requests: Sequence[Request], *, on_step: OnStep | None = None) -> Tensor:
    """Pictures (B, 3, H, W) of requests that share guidance_scale and steps (those of the first one count).

    Raises ValueError if steps is not in [1, num_train_timesteps].
    """
    first = requests[0]
    return _denoise(
        model,
        requests,
        {},
        _noise_of(model, requests),
        guidance_scale=asked_or_set(first.guidance_scale, model.settings, "guidance_scale", 1.0),
        num_inference_steps=asked_or_set(first.steps, model.settings, "num_inference_steps", None),
        on_step=on_step,
    )


def sample_upsampler(
    model: SamplingModel, requests: Sequence[Request], low_res: Tensor, *, on_step: OnStep | None = None
) -> Tensor:
    """Enlarge low_res (B, 3, h, w) to (B, 3, H, W), with the model's own guidance scale, steps and noise level.

    The pictures of the stage before are rounded to 8 bits first, as those that the upsampler was trained on, and then
    noised to a fixed level (noise conditioning augmentation; Ho et al., 2022, section 4.2).
    """
    noise = _noise_of(model, requests)
    enlarged = upsample(quantize_8_bit(low_res).to(model.device), model.settings["resolution"])
    level = torch.full((len(requests),), int(model.settings["noise_level"]), device=model.device)
    low_res = augment_low_res(make_schedule(**model.settings["low_res_schedule"]), enlarged, noise(-1), level)
    return _denoise(
        model,
        requests,
        {"low_res": low_res, "noise_level": level},
        noise,
        guidance_scale=model.settings.get("guidance_scale", 1.0),
        num_inference_steps=model.settings["num_inference_steps"],
        on_step=on_step,
    )


def objective_of(model: SamplingModel) -> Objective:
    """What a diffusion model was trained to undo."""
    return make_objective(model.settings["objective"])


def _denoise(
    model: SamplingModel,
    requests: Sequence[Request],
    extra: dict[str, Tensor],
    noise: Callable[[int], Tensor],
    *,
    guidance_scale: float,
    num_inference_steps: int,
    on_step: OnStep | None,
) -> Tensor:
    condition, null = encode_conditions(model, requests)
    objective = objective_of(model)
    return sample(
        guide(objective, model.module, condition | extra, null, guidance_scale),
        objective,
        noise(-1),
        sampler=model.settings["sampler"],
        num_inference_steps=num_inference_steps,
        eta=model.settings.get("eta", 0.0),
        noise=noise,
        on_step=on_step,
    )


def _noise_of(model: SamplingModel, requests: Sequence[Request]) -> Callable[[int], Tensor]:
    """Draw the next noise (B, 3, H, W): row i from the stream of request i, whatever else is in the batch."""
    streams = [random_stream(request.seed, model.name) for request in requests]
    shape = (model.network.get("in_channels", 3), model.settings["resolution"], model.settings["resolution"])

    def noise(step: int) -> Tensor:
        del step  # the order of the draws is what counts
        return torch.stack([torch.randn(shape, generator=stream) for stream in streams]).to(model.device)

    return noise
