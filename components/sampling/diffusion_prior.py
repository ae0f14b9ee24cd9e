"""First half of DALL-E 2's generator: from prompts to embeddings of images, which the decoder draws.

Shapes: B plans, E embedding_dim.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from components.configuration.sampling import DiffusionPriorSampling
from components.models.contrastive import unit_variance
from components.models.diffusion.guidance import guide
from components.models.diffusion.objective import make_objective
from components.models.diffusion.samplers import sample
from components.sampling.best_of import best_of
from components.sampling.frozen_text import ContrastiveText
from components.sampling.generator import Between, after_each
from components.sampling.model import SamplingModel
from components.sampling.plan import Plan, random_stream


def sample_image_embeddings(
    model: SamplingModel, text: ContrastiveText, plans: Sequence[Plan], *, between: Between | None = None
) -> Tensor:
    """Image embeddings (B, E) of unit variance for the plans' prompts, on the model's device.

    Of several candidates (two, as published) each plan gets the one nearest to the text's embedding. Steps,
    guidance scale and the number of candidates are of its sampling settings.

    Args:
        model: a diffusion prior.
        text: of the contrastive encoder that the prior was trained with.
        between: called after each denoising step of each candidate.
    """
    sampling = plans[0].of(model)
    prompts = [plan.prompt or "" for plan in plans]
    condition, null = text_conditions(text, prompts), text_conditions(text, [""] * len(prompts))

    def candidate(number: int) -> Tensor:
        stage = model.name if number == 0 else f"{model.name}/{number}"
        streams = [random_stream(plan.seed, stage) for plan in plans]
        return embeddings(model, condition, null, streams, sampling, between=between)

    def likeness(embedding: Tensor) -> Tensor:
        return F.cosine_similarity(embedding, condition["text_embedding"])

    return best_of(candidate, likeness, n=sampling.candidates).chosen


def check_prior_steps(model: SamplingModel, sampling: DiffusionPriorSampling) -> None:
    """Raise ValueError, in one line, for more steps than the model was trained with."""
    limit = model.settings["objective"]["num_train_timesteps"]
    if sampling.num_inference_steps > limit:
        raise ValueError(f"{model.name}: steps must be in [1, {limit}], not {sampling.num_inference_steps}")


def text_conditions(text: ContrastiveText, prompts: Sequence[str]) -> dict[str, Tensor]:
    """The conditions of the prior: text_states (B, L, T) and text_embedding (B, E)."""
    features = text.encode(prompts)
    return {"text_states": features.states, "text_embedding": features.embedding}


def embeddings(
    model: SamplingModel,
    condition: dict[str, Tensor],
    null: dict[str, Tensor],
    streams: Sequence[torch.Generator],
    sampling: DiffusionPriorSampling,
    *,
    between: Between | None,
) -> Tensor:
    """One candidate each, (B, E): diffusion without clipping, then the length that embeddings have."""
    objective, noise = make_objective(model.settings["objective"]), noise_of(model, streams)

    def network(x_t: Tensor, time: Tensor, **conditions: Tensor) -> Tensor:
        return model.module(x_t[:, :, 0, 0], time, **conditions)[:, :, None, None]

    x_0 = sample(
        guide(objective, network, condition, null, sampling.guidance_scale),
        objective,
        noise(-1),
        sampler=sampling.sampler,
        num_inference_steps=sampling.num_inference_steps,
        noise=noise,
        threshold="none",
        on_step=after_each(between),
    )
    return unit_variance(x_0[:, :, 0, 0])


def noise_of(model: SamplingModel, streams: Sequence[torch.Generator]) -> Callable[[int], Tensor]:
    """Draw the next noise (B, E, 1, 1), images of one pixel for the samplers, row i from stream i."""

    def noise(step: int) -> Tensor:
        del step  # the order of the draws is what counts
        rows = [torch.randn(model.network["embedding_dim"], 1, 1, generator=stream) for stream in streams]
        return torch.stack(rows).to(model.device)

    return noise
