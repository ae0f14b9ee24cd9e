"""Images of a VAE (Kingma & Welling, 2014): its prior decoded, in fp32, each image with its own random stream.

Shapes: B images, H = W resolution.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from components.models.autoencoder import Autoencoder
from components.models.bottleneck import GaussianBottleneck
from components.sampling.generator import Generator, Hooks, Parts
from components.sampling.model import SamplingModel, random_stream
from components.sampling.requests import Request


@torch.no_grad()
def sample_vae(model: SamplingModel, requests: Sequence[Request]) -> Tensor:
    """z ~ N(0, I) of each request's seed, decoded to the mean image: (B, 3, H, W), near [-1, 1] and not clipped.

    Raises ValueError if the model's codes have a prior of their own.
    """
    network = model.module
    if not isinstance(network, Autoencoder) or not isinstance(network.bottleneck, GaussianBottleneck):
        raise ValueError(f"the model of stage {model.name} is no VAE: its latents are not N(0, I), they need a prior")
    streams = [random_stream(request.seed, model.name) for request in requests]
    z = torch.stack([torch.randn(network.latent_shape, generator=stream) for stream in streams])
    return network.decode(z.to(model.device))


class VAE(Generator):
    """Noise -> decoder of a VAE."""

    name, title = "vae", "Decoder"

    @classmethod
    def first_of(cls, parts: Parts) -> SamplingModel | None:
        model = parts.model
        if model is None or model.kind != "autoencoder" or model.network["bottleneck"]["kind"] != "gaussian":
            return None
        return model

    def sample(self, requests: Sequence[Request], hooks: Hooks) -> dict[str, Tensor]:
        return {self.first.name: sample_vae(self.first, requests)}
