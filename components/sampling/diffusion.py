"""The diffusion branch's stages: base and upsamplers, in fp32, each image with its own random stream.

Shapes: B images, H = W resolution. Images are float32 (B, 3, H, W) in [-1, 1].
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from components.diffusion.corruption import augment_low_res, quantize_8_bit, upsample
from components.diffusion.guidance import guide
from components.diffusion.objective import Objective, make_objective
from components.diffusion.samplers import SAMPLERS, Denoise, OnStep, SamplerName, Score, sample
from components.diffusion.schedule import make_schedule
from components.sampling.classifier import classifier_score
from components.sampling.model import Conditions, SamplingModel, asked_or_set, encode_conditions
from components.sampling.requests import Request, random_stream

NOTHING = Conditions({}, {})
MOST_STEPS = 1000  # of a process without training steps


def sample_base(
    model: SamplingModel,
    requests: Sequence[Request],
    *,
    frozen: Conditions = NOTHING,
    classifier: SamplingModel | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Images (B, 3, H, W) of requests that share guidance_scale, classifier_scale, steps and sampler (those of the
    first one count).

    Args:
        frozen: what `frozen_conditions` makes of them, for a model that takes such.
        classifier: of noisy images; its gradient towards each request's label guides.

    Raises ValueError for an unknown sampler, or steps that are out of its range.
    """
    first = requests[0]
    return denoise(
        model,
        requests,
        {},
        noise_of(model, requests),
        frozen=frozen,
        guidance_scale=asked_or_set(first.guidance_scale, model.settings, "guidance_scale", 1.0),
        num_inference_steps=asked_or_set(first.steps, model.settings, "num_inference_steps", None),
        sampler=asked_or_set(first.sampler, model.settings, "sampler", "ddim"),
        score=None if classifier is None else score_of(classifier, requests),
        on_step=on_step,
    )


def score_of(classifier: SamplingModel, requests: Sequence[Request]) -> Score | None:
    """Towards the requests' labels, by the scale that they ask for, else by the classifier's own; None if it is 0."""
    scale = asked_or_set(requests[0].classifier_scale, classifier.settings, "guidance_scale", 1.0)
    if scale == 0:
        return None
    return classifier_score(classifier, encode_conditions(classifier, requests).condition["label"], scale)


def check_sampling(model: SamplingModel, request: Request) -> None:
    """Raise ValueError, in one line, if the model can't be sampled by the request's sampler or in its steps."""
    if request.sampler is not None and request.sampler not in SAMPLERS:
        raise ValueError(f"unknown sampler {request.sampler!r}: choose {', '.join(SAMPLERS[:-1])} or {SAMPLERS[-1]}")
    limit = model.settings["objective"].get("num_train_timesteps", MOST_STEPS)
    if request.steps is not None and not 1 <= request.steps <= limit:
        raise ValueError(f"steps must be in [1, {limit}], not {request.steps}")


def sample_upsampler(
    model: SamplingModel,
    requests: Sequence[Request],
    low_res: Tensor,
    *,
    frozen: Conditions = NOTHING,
    on_step: OnStep | None = None,
) -> Tensor:
    """Enlarge low_res (B, 3, h, w) to (B, 3, H, W), with the model's own guidance scale, steps and noise level.

    The images of the stage before are rounded to 8 bits first, as those that the upsampler was trained on, and then
    noised to a fixed level (noise conditioning augmentation; Ho et al., 2022, section 4.2).
    """
    noise = noise_of(model, requests)
    enlarged = upsample(quantize_8_bit(low_res).to(model.device), model.settings["resolution"])
    level = torch.full((len(requests),), int(model.settings["noise_level"]), device=model.device)
    low_res = augment_low_res(make_schedule(**model.settings["low_res_schedule"]), enlarged, noise(-1), level)
    return denoise(
        model,
        requests,
        {"low_res": low_res, "noise_level": level},
        noise,
        frozen=frozen,
        guidance_scale=model.settings.get("guidance_scale", 1.0),
        num_inference_steps=model.settings["num_inference_steps"],
        sampler=model.settings["sampler"],
        on_step=on_step,
    )


def objective_of(model: SamplingModel) -> Objective:
    """What a diffusion model was trained to undo."""
    return make_objective(model.settings["objective"])


def denoise(
    model: SamplingModel,
    requests: Sequence[Request],
    extra: dict[str, Tensor],
    noise: Callable[[int], Tensor],
    *,
    frozen: Conditions = NOTHING,
    guidance_scale: float,
    num_inference_steps: int,
    sampler: SamplerName,
    on_step: OnStep | None,
    score: Score | None = None,
    around: Callable[[Denoise], Denoise] = lambda network: network,
) -> Tensor:
    """Images (B, 3, H, W) of requests by the model's own settings.

    Args:
        extra: conditions that are never null.
        noise: the next noise (B, 3, H, W), x_T first.
        around: what is done to the guided network before it is sampled from.
    """
    condition, null = encode_conditions(model, requests)
    objective, settings = objective_of(model), model.settings
    network = guide(
        objective,
        model.module,
        condition | frozen.condition | extra,
        null | frozen.null,
        guidance_scale,
        interval=settings.get("guidance_interval"),
        rescale=settings.get("guidance_rescale", 0.0),
    )
    return sample(
        around(network),
        objective,
        noise(-1),
        sampler=sampler,
        num_inference_steps=num_inference_steps,
        noise=noise,
        score=score,
        on_step=on_step,
        **sampling_options(settings),
    )


def sampling_options(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `sample` that no request has a say in."""
    return {
        "eta": settings.get("eta", 0.0),
        "spacing": settings.get("spacing"),
        "threshold": settings.get("threshold", "static"),
        "percentile": settings.get("threshold_percentile", 0.995),
    }


def noise_of(model: SamplingModel, requests: Sequence[Request]) -> Callable[[int], Tensor]:
    """Draw the next noise (B, 3, H, W): row i from the stream of request i, whatever else is in the batch."""
    streams = [random_stream(request.seed, model.name) for request in requests]
    shape = (model.network.get("in_channels", 3), model.settings["resolution"], model.settings["resolution"])

    def noise(step: int) -> Tensor:
        del step  # the order of the draws is what counts
        return torch.stack([torch.randn(shape, generator=stream) for stream in streams]).to(model.device)

    return noise
