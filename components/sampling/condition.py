"""Images that a prior is given: the tokens that stand in front of its sequence. Shapes: B requests."""

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor

from components.models.autoencoder import Autoencoder
from components.sampling.images import read_image
from components.sampling.model import SamplingModel
from components.sampling.requests import Request


def condition_tokens(tokenizer: SamplingModel, requests: Sequence[Request]) -> Tensor:
    """Tokens (B, M) of the requests' condition images, all of which must have one, on the tokenizer's device."""
    resolution = tokenizer.settings["resolution"]
    images = [read_image(request.condition or b"", resolution=resolution) for request in requests]
    assert isinstance(tokenizer.module, Autoencoder)
    return rearrange(tokenizer.module.tokenize(torch.stack(images).to(tokenizer.device)), "b h w -> b (h w)")
