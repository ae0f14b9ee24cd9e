"""What networks trained before make of plans for a diffusion model: states of the prompt (Imagen), or an embedding
of the image that the prompt asks for (DALL-E 2).

Shapes: B plans, L text length, D features of a state, E embedding_dim.
"""

from collections.abc import Sequence

import torch

from components.sampling.diffusion_prior import sample_image_embeddings
from components.sampling.frozen_text import ContrastiveText, FrozenText
from components.sampling.generator import Between
from components.sampling.model import SamplingModel
from components.sampling.plan import Conditions, Plan


def frozen_conditions(
    model: SamplingModel,
    plans: Sequence[Plan],
    *,
    text: FrozenText | None = None,
    prior: SamplingModel | None = None,
    between: Between | None = None,
) -> Conditions:
    """Those of text_states (B, L, D) and image_embedding (B, E) that the model takes, and the null of each.

    A plan without a prompt counts as the empty text.

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
