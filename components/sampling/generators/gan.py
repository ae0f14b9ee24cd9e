"""Images of a GAN in one pass, in fp32, each from its own random stream.

Shapes: B images, Z noise_dim, H = W resolution.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from components.configuration.sampling import GANSampling
from components.sampling.generator import Generator, Hooks, Parts
from components.sampling.model import SamplingModel, random_stream, sampling_of
from components.sampling.requests import Request, class_id


@torch.no_grad()
def sample_gan(model: SamplingModel, requests: Sequence[Request]) -> Tensor:
    """Images (B, 3, H, W) in [-1, 1]. A request without a label gets one from its own stream, each class alike.

    Of a request label, seed and truncation count; they share the truncation. Batch norms keep the statistics of noise
    that is not truncated, so a low threshold feeds them activations of other statistics. Raises ValueError for a label
    that the model does not know, or no truncation.
    """
    streams = [random_stream(request.seed, model.name) for request in requests]
    noise = torch.stack([torch.randn(model.network["noise_dim"], generator=stream) for stream in streams])
    noise = truncated(noise, gan_sampling(model, requests[0]).truncation)
    label = None
    if model.classes:
        labels = [_label(model, request, stream) for request, stream in zip(requests, streams, strict=True)]
        label = torch.tensor(labels, device=model.device)
    return model.module(noise.to(model.device), label)


def gan_sampling(model: SamplingModel, request: Request) -> GANSampling:
    """How a GAN samples for a request. Raises ValueError for a truncation that is not positive."""
    return sampling_of(model, request, truncation=request.truncation)


def truncated(noise: Tensor, truncation: float | None) -> Tensor:
    """Standard normal noise as noise of the same distribution without |z| above `truncation` (Brock et al., 2019,
    section 3.1), of the same shape and dtype; None leaves it as it is.

    Values outside are not drawn again: each keeps its quantile, z' = F^-1(P(z)), with P the normal distribution and F
    the truncated one. So a seed still decides its noise, and another threshold moves it continuously.
    """
    if truncation is None:
        return noise
    z = noise.double()  # and erfc in place of torch's ndtr, which is 0 from -9 on
    below = math.erfc(truncation / math.sqrt(2)) / 2  # mass on either side of the threshold
    quantile = below + (1 - 2 * below) * torch.erfc(z.abs() / math.sqrt(2)) / 2  # of -|z|
    return (z.sign() * -torch.special.ndtri(quantile).clamp(-truncation, 0)).to(noise.dtype)


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

    def check(self, request: Request) -> None:
        super().check(request)
        gan_sampling(self.first, request)

    def sample(self, requests: Sequence[Request], hooks: Hooks) -> dict[str, Tensor]:
        return {self.first.name: sample_gan(self.first, requests)}
