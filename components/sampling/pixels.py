"""Images from a PixelCNN or a PixelRNN, value by value.

Shapes: B requests, S = resolution.
"""

from collections.abc import Sequence

from torch import Tensor

from components.diffusion.corruption import from_levels
from components.models.pixelcnn import GatedPixelCNN
from components.models.row_lstm import RowLSTM
from components.sampling.model import SamplingModel, asked_or_set, encode_conditions
from components.sampling.pixelwise import generate_grid
from components.sampling.requests import Request, random_stream


def sample_pixels(model: SamplingModel, requests: Sequence[Request]) -> Tensor:
    """Images (B, 3, S, S) in [-1, 1] of requests that share guidance_scale, temperature, top_k and top_p."""
    side = model.settings["resolution"]
    return from_levels(sample_grid(model, requests, height=side, width=side))


def sample_grid(
    model: SamplingModel, requests: Sequence[Request], *, height: int, width: int, stage: str | None = None
) -> Tensor:
    """Values (B, C, height, width) int64 of pixels or tokens; `stage` names the random streams, else the model."""
    first, settings = requests[0], model.settings
    assert isinstance(model.module, GatedPixelCNN | RowLSTM)
    return generate_grid(
        model.module,
        generators=[random_stream(request.seed, stage or model.name) for request in requests],
        height=height,
        width=width,
        label=encode_conditions(model, requests).condition.get("label"),
        guidance_scale=asked_or_set(first.guidance_scale, settings, "guidance_scale", 1.0),
        temperature=asked_or_set(first.temperature, settings, "temperature", 1.0),
        top_k=asked_or_set(first.top_k, settings, "top_k", None),
        top_p=asked_or_set(first.top_p, settings, "top_p", None),
    )
