"""Images of a single network without other stages: a PixelCNN or PixelRNN, a GAN, a VAE.

Shapes: B plans, S = resolution, Z noise_dim of a GAN.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from components.models.autoencoder import Autoencoder
from components.models.bottleneck import GaussianBottleneck
from components.models.diffusion.corruption import from_levels
from components.models.pixelcnn import GatedPixelCNN
from components.models.row_lstm import RowLSTM
from components.sampling.generator import Between, Generator, Hooks, Parts, after_each
from components.sampling.model import SamplingModel
from components.sampling.pixelwise import generate_grid
from components.sampling.plan import Plan, encode_conditions, random_stream


def sample_grid(
    model: SamplingModel,
    plans: Sequence[Plan],
    *,
    height: int,
    width: int,
    stage: str | None = None,
    between: Between | None = None,
) -> Tensor:
    """Samples values (B, C, height, width) int64 of pixels or tokens.

    `stage` names the random streams; without a stage the model's name does.
    """
    assert isinstance(model.module, GatedPixelCNN | RowLSTM)
    return generate_grid(
        model.module,
        generators=[random_stream(plan.seed, stage or model.name) for plan in plans],
        height=height,
        width=width,
        label=encode_conditions(model, plans).condition.get("label"),
        on_token=after_each(between),
        **plans[0].of(model).model_dump(),
    )


class Pixels(Generator):
    """PixelCNN or PixelRNN, of raw pixels."""

    name, title = "pixels", "Pixel by pixel"

    @classmethod
    def first_of(cls, parts: Parts) -> SamplingModel | None:
        model = parts.model
        own = model is not None and model.kind in ("pixelcnn", "row_lstm") and model.settings.get("resolution")
        return model if own else None  # others are over a grid of tokens

    def make(self, plans: Sequence[Plan], hooks: Hooks) -> dict[str, Tensor]:
        side = self.first.settings["resolution"]
        values = sample_grid(self.first, plans, height=side, width=side, between=hooks.between)
        return {self.first.name: from_levels(values)}


@torch.no_grad()
def sample_gan(model: SamplingModel, plans: Sequence[Plan]) -> Tensor:
    """Samples images (B, 3, S, S) in [-1, 1] from a GAN.

    A plan without a label gets one from its own stream, each class alike. Label and seed of a plan count; plans share
    the truncation. Batch norms keep the statistics of noise that is not truncated, so a low threshold feeds them
    activations of other statistics.
    """
    streams = [random_stream(plan.seed, model.name) for plan in plans]
    noise = torch.stack([torch.randn(model.network["noise_dim"], generator=stream) for stream in streams])
    noise = truncated(noise, plans[0].of(model).truncation)
    label = None
    if model.classes:
        labels = [
            int(torch.randint(len(model.classes), (), generator=stream)) if plan.label is None else plan.label
            for plan, stream in zip(plans, streams, strict=True)
        ]
        label = torch.tensor(labels, device=model.device)
    return model.module(noise.to(model.device), label)


def truncated(noise: Tensor, truncation: float | None) -> Tensor:
    """Truncates standard normal noise to |z| <= `truncation` (Brock et al., 2019, section 3.1).

    Shape and dtype stay the same; None leaves the noise as it is.

    Values outside are not drawn again: each keeps its quantile, z' = F^-1(P(z)), with P the normal distribution and F
    the truncated one. So a seed still decides its noise, and another threshold moves it continuously.
    """
    if truncation is None:
        return noise
    z = noise.double()  # and erfc in place of torch's ndtr, which is 0 from -9 on
    below = math.erfc(truncation / math.sqrt(2)) / 2  # mass on either side of the threshold
    quantile = below + (1 - 2 * below) * torch.erfc(z.abs() / math.sqrt(2)) / 2  # of -|z|
    return (z.sign() * -torch.special.ndtri(quantile).clamp(-truncation, 0)).to(noise.dtype)


class GAN(Generator):
    """Noise -> generator of a GAN."""

    name, title = "gan", "Generator"

    @classmethod
    def first_of(cls, parts: Parts) -> SamplingModel | None:
        return parts.model if parts.model is not None and parts.model.kind == "gan" else None

    def make(self, plans: Sequence[Plan], hooks: Hooks) -> dict[str, Tensor]:
        return {self.first.name: sample_gan(self.first, plans)}


@torch.no_grad()
def sample_vae(model: SamplingModel, plans: Sequence[Plan]) -> Tensor:
    """Decodes z ~ N(0, I) of each plan's seed to the mean image (Kingma and Welling, 2014).

    The images are (B, 3, S, S), near [-1, 1] and not clipped.

    Raises ValueError if the model's codes have a prior of their own.
    """
    network = model.module
    if not isinstance(network, Autoencoder) or not isinstance(network.bottleneck, GaussianBottleneck):
        raise ValueError(f"the model of stage {model.name} is no VAE: its latents are not N(0, I), they need a prior")
    streams = [random_stream(plan.seed, model.name) for plan in plans]
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

    def make(self, plans: Sequence[Plan], hooks: Hooks) -> dict[str, Tensor]:
        return {self.first.name: sample_vae(self.first, plans)}
