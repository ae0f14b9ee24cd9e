"""Images of a GAN in one pass, in fp32, each from its own random stream.

Shapes: B images, Z noise_dim, H = W resolution.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from components.sampling.generator import Generator, OnStep, Parts
from components.sampling.model import SamplingModel
from components.sampling.requests import Request, class_id, random_stream


@torch.no_grad()
def sample_gan(model: SamplingModel, requests: Sequence[Request]) -> Tensor:
    """Images (B, 3, H, W) in [-1, 1]. A request without a label gets one from its own stream, each class alike.

    Of a request only label and seed count. Raises ValueError for a label that the model does not know.
    """
    streams = [random_stream(request.seed, model.name) for request in requests]
    noise = torch.stack([torch.randn(model.network["noise_dim"], generator=stream) for stream in streams])
    label = None
    if model.classes:
        labels = [_label(model, request, stream) for request, stream in zip(requests, streams, strict=True)]
        label = torch.tensor(labels, device=model.device)
    return model.module(noise.to(model.device), label)


def _label(model: SamplingModel, request: Request, stream: torch.Generator) -> int:
    if request.label is not None:
        return class_id(request.label, model.classes)
    return int(torch.randint(len(model.classes), (), generator=stream))


class GAN(Generator):
    """Noise -> generator of a GAN."""

    name, title = "gan", "Generator"

    @classmethod
    def first_of(cls, parts: Parts) -> SamplingModel | None:
        return parts.model if parts.model is not None and parts.model.kind == "gan" else None

    def sample(self, requests: Sequence[Request], on_step: OnStep | None) -> dict[str, Tensor]:
        return {self.first.name: sample_gan(self.first, requests)}
