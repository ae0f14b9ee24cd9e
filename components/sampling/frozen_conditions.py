"""Conditions of plans from frozen networks: states of the prompt, or an embedding of the image.

States come from a text encoder (Imagen); the embedding of the image that the prompt asks for comes from a diffusion
prior (DALL-E 2's first half).

Shapes: B plans, L text length, D features of a state, E embedding_dim.
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
from components.sampling.frozen_text import ContrastiveText, FrozenText
from components.sampling.generator import Between, after_each
from components.sampling.model import SamplingModel
from components.sampling.plan import Conditions, Plan, random_stream


def frozen_conditions(
    model: SamplingModel,
    plans: Sequence[Plan],
    *,
    text: FrozenText | None = None,
    prior: SamplingModel | None = None,
    between: Between | None = None,
) -> Conditions:
    """Returns the model's conditions from frozen networks, and the null of each condition.

    Conditions are text_states (B, L, D) and image_embedding (B, E), as the model takes them. A plan without a prompt
    counts as the empty text.

    Args:
        model: a diffusion model.
        text: the encoder that the model, or the prior before it, was trained with.
        prior: a diffusion prior, for a decoder.
        between: called after each denoising step of the prior.

    Raises ValueError, in one line, if one that is needed is missing or does not fit.
    """
    condition: dict[str, torch.Tensor] = {}
    null: dict[str, torch.Tensor] = {}
    if width := model.network.get("text_states_dim"):
        if text is None or text.states_shape[1] != width:
            raise ValueError(f"the model of stage {model.name} needs a text encoder of {width} features a token")
        condition["text_states"] = text.encode([plan.prompt or "" for plan in plans]).states
        null["text_states"] = text.encode([""]).states.expand_as(condition["text_states"])
    if size := model.network.get("image_embedding_dim"):
        if prior is None or prior.network["embedding_dim"] != size or not isinstance(text, ContrastiveText):
            raise ValueError(
                f"the model of stage {model.name} needs a diffusion prior over {size} numbers, and the encoder of that"
            )
        embedding = sample_image_embeddings(prior, text, plans, between=between)
        condition["image_embedding"] = embedding.to(model.device)
        null["image_embedding"] = torch.zeros_like(condition["image_embedding"])
    return Conditions(condition, null)


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
    """Raise ValueError, in one line, for more steps than in the model's training."""
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
    """One candidate embedding of each plan, (B, E).

    Diffusion runs without clipping; the result is scaled to the length of embeddings.
    """
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
    """Draws the next noise (B, E, 1, 1), row i from stream i.

    The samplers see images of one pixel.
    """

    def noise(step: int) -> Tensor:
        del step  # the order of the draws is what counts
        rows = [torch.randn(model.network["embedding_dim"], 1, 1, generator=stream) for stream in streams]
        return torch.stack(rows).to(model.device)

    return noise
