"""Pictures that a model is given: as pixels, and as the tokens that stand in front of a prior's sequence.

Shapes: B requests, S = resolution.
"""

import io
from collections.abc import Sequence

import numpy as np
import torch
from einops import rearrange
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from components.models.autoencoder import Autoencoder
from components.sampling.model import SamplingModel
from components.sampling.requests import Request


def read_picture(data: bytes, *, resolution: int) -> Tensor:
    """A picture file as (3, S, S) in [-1, 1]; other sizes are area-averaged. Raises ValueError if it is none."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            pixels = np.asarray(image.convert("RGB").resize((resolution, resolution), Image.Resampling.BOX))
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"the given picture can't be read ({error}); give a PNG") from error
    return rearrange(torch.from_numpy(pixels.copy()).float() / 127.5 - 1, "h w c -> c h w")


def condition_tokens(tokenizer: SamplingModel, requests: Sequence[Request]) -> Tensor:
    """Tokens (B, M) of the requests' condition pictures, all of which must have one, on the tokenizer's device."""
    resolution = tokenizer.settings["resolution"]
    pictures = [read_picture(request.condition or b"", resolution=resolution) for request in requests]
    assert isinstance(tokenizer.module, Autoencoder)
    return rearrange(tokenizer.module.tokenize(torch.stack(pictures).to(tokenizer.device)), "b h w -> b (h w)")
