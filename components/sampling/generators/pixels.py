"""Images from a PixelCNN or a PixelRNN, value by value.

Shapes: B requests, S = resolution.
"""

from collections.abc import Sequence

from torch import Tensor

from components.configuration.sampling import TokenSampling
from components.models.diffusion.corruption import from_levels
from components.models.pixelcnn import GatedPixelCNN
from components.models.row_lstm import RowLSTM
from components.sampling.generator import Between, Generator, Hooks, Parts, after_each
from components.sampling.model import SamplingModel, encode_conditions, random_stream, sampling_of
from components.sampling.pixelwise import generate_grid
from components.sampling.requests import Request


def sample_pixels(model: SamplingModel, requests: Sequence[Request], *, between: Between | None = None) -> Tensor:
    """Images (B, 3, S, S) in [-1, 1] of requests that share guidance_scale, temperature, top_k and top_p."""
    side = model.settings["resolution"]
    return from_levels(sample_grid(model, requests, height=side, width=side, between=between))


def sample_grid(
    model: SamplingModel,
    requests: Sequence[Request],
    *,
    height: int,
    width: int,
    stage: str | None = None,
    between: Between | None = None,
) -> Tensor:
    """Values (B, C, height, width) int64 of pixels or tokens; `stage` names the random streams, else the model."""
    sampling = token_sampling(model, requests[0])
    assert isinstance(model.module, GatedPixelCNN | RowLSTM)
    return generate_grid(
        model.module,
        generators=[random_stream(request.seed, stage or model.name) for request in requests],
        height=height,
        width=width,
        label=encode_conditions(model, requests).condition.get("label"),
        on_token=after_each(between),
        **sampling.model_dump(),
    )


def token_sampling(model: SamplingModel, request: Request) -> TokenSampling:
    """Of a model that draws values one after another. Raises ValueError for what it can't do."""
    names = ("guidance_scale", "temperature", "top_k", "top_p")
    return sampling_of(model, request, num_inference_steps=request.steps, **{n: getattr(request, n) for n in names})


class Pixels(Generator):
    """PixelCNN or PixelRNN, of raw pixels."""

    name, title = "pixels", "Pixel by pixel"

    @classmethod
    def first_of(cls, parts: Parts) -> SamplingModel | None:
        model = parts.model
        own = model is not None and model.kind in ("pixelcnn", "row_lstm") and model.settings.get("resolution")
        return model if own else None  # others are over a grid of tokens

    def check(self, request: Request) -> None:
        super().check(request)
        token_sampling(self.first, request)

    def sample(self, requests: Sequence[Request], hooks: Hooks) -> dict[str, Tensor]:
        return {self.first.name: sample_pixels(self.first, requests, between=hooks.between)}
