"""Images of a single network: PixelCNN and PixelRNN, GAN, VAE, image-to-image (Palette).

Shapes: B plans, S = resolution, Z noise_dim of a GAN.
"""

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from components.models.diffusion.corruption import MASK_TASKS, Degraded, denoise_in_mask, fill_mask, from_levels
from components.sampling.autoregressive import generate_grid
from components.sampling.generator import Generator, Hooks, Parts
from components.sampling.generators.diffusion import check_sampling, denoise, image_noise
from components.sampling.image_files import gray_png
from components.sampling.model import SamplingModel
from components.sampling.plan import Plan, check_conditions, encode_conditions, given_for_task, noise_of, random_stream
from components.sampling.requests import Request


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
        values = generate_grid(
            self.first.module,
            encode_conditions(self.first, plans),
            generators=[random_stream(plan.seed, self.first.name) for plan in plans],
            height=side,
            width=side,
            sampling=plans[0].of(self.first),
            on_token=hooks.each,
        )
        return {self.first.name: from_levels(values)}


@torch.no_grad()
def sample_gan(model: SamplingModel, plans: Sequence[Plan]) -> Tensor:
    """Samples images (B, 3, S, S) in [-1, 1] from a GAN.
    A plan without a label gets one from its own stream, each class alike. Batch norms keep the statistics of noise that
    is not truncated, so a low threshold feeds them activations of other statistics."""
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
    Shape and dtype stay the same; None leaves the noise as it is. Values outside are not drawn again: each keeps its
    quantile, z' = F^-1(P(z)), with P the normal distribution and F the truncated one. So a seed still decides its
    noise, and another threshold moves it continuously."""
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


class VAE(Generator):
    """Noise z ~ N(0, I) -> decoder of a VAE: the mean image, not clipped (Kingma and Welling, 2014)."""

    name, title = "vae", "Decoder"

    @classmethod
    def first_of(cls, parts: Parts) -> SamplingModel | None:
        model = parts.model
        if model is None or model.kind != "autoencoder" or model.network["bottleneck"]["kind"] != "gaussian":
            return None
        return model

    def make(self, plans: Sequence[Plan], hooks: Hooks) -> dict[str, Tensor]:
        model = self.first
        z = noise_of(plans, model.name, model.module.latent_shape, model.device)()
        return {model.name: model.module.decode(z)}


class ImageToImage(Generator):
    """An image with something missing -> an image-to-image model -> the image (Saharia et al., 2022)."""

    name, title = "translate", "Image to image"
    shows_steps = True

    @classmethod
    def first_of(cls, parts: Parts) -> SamplingModel | None:
        model = parts.model
        return model if model is not None and model.settings.get("role") == "image_to_image" else None

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(self.first.settings["tasks"])

    def resolve(self, request: Request) -> Plan:
        given = given_for_task(self.first, request, self.tasks)
        check_conditions(self.first, request)
        plan = self.plan_of(request, given=given)
        check_sampling(self.first, plan.of(self.first))
        return plan

    def make(self, plans: Sequence[Plan], hooks: Hooks) -> dict[str, Tensor]:
        """Makes the images of plans, each with a task of its own; known pixels come out as they came in.
        Where a task changes every pixel the mask is all of the image, and what the network is shown has no noise."""
        model, given = self.first, [plan.given for plan in plans if plan.given is not None]
        known = torch.stack([each.known for each in given]).to(model.device)
        mask = torch.stack([each.mask for each in given]).to(model.device)
        noise = image_noise(model, plans)
        filled = [
            fill_mask(image, where, drawn) if each.has_known else image
            for each, image, where, drawn in zip(given, known, mask, noise(), strict=True)
        ]
        made = denoise(
            model,
            plans,
            noise=noise,
            extra={"condition_image": Degraded(torch.stack(filled), mask).condition},
            around=partial(denoise_in_mask, known=known, mask=mask),
            on_step=hooks.of_stage(model.name),
        )
        return {model.name: torch.where(mask > 0, made, known)}

    def example(self) -> Request:
        settings = self.first.settings
        task, side = settings["tasks"][0], settings["resolution"]
        side = side // settings["super_resolution_factors"][0] if task == "super_resolution" else side
        mask = gray_png(side) if task in MASK_TASKS else None
        return super().example().replace(task=task, image=gray_png(side), mask=mask)
