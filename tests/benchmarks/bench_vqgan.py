"""One step of VQ-GAN training, ours against diffusers' VQModel inside the same step.

Both sides have the same discriminator, feature network, losses, adaptive weight and optimizers, batch 8 of 64 x 64, an
8 x 8 grid of 512 codes of 8 dimensions, fp32 on one thread, each in the faster of its two memory formats. Ours also
updates its codebook.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import VQModel
from torch import Tensor, nn

from components.losses.adversarial import balanced_generator_loss, generator_loss, hinge_discriminator_loss
from components.losses.reconstruction import reconstruction_loss
from components.models.autoencoder import Autoencoder
from components.models.discriminator import PatchDiscriminator
from components.models.perceptual import PerceptualLoss

RESOLUTION, BATCH_SIZE, CHANNELS, CHANNEL_MULT = 64, 8, 32, (1, 2, 2, 4)
LATENT_CHANNELS, CODEBOOK_SIZE, CODEBOOK_DIM, COMMITMENT_COST = 128, 512, 8, 0.25

Step = Callable[[], None]


class Features(nn.Module):
    """Two feature maps of a small untrained network: the cost of a perceptual loss, not its meaning."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_1 = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.conv_2 = nn.Conv2d(16, 32, 3, stride=2, padding=1)

    def forward(self, image: Tensor) -> list[Tensor]:
        first = F.relu(self.conv_1(image))
        return [first, F.relu(self.conv_2(first))]


class Peer(nn.Module):
    """diffusers' VQModel of the same widths, blocks and attention; its codebook learns by gradient."""

    def __init__(self) -> None:
        super().__init__()
        levels = len(CHANNEL_MULT)
        self.model = VQModel(
            block_out_channels=tuple(CHANNELS * mult for mult in CHANNEL_MULT),
            down_block_types=("DownEncoderBlock2D",) * (levels - 1) + ("AttnDownEncoderBlock2D",),
            up_block_types=("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * (levels - 1),
            layers_per_block=1,
            latent_channels=LATENT_CHANNELS,
            num_vq_embeddings=CODEBOOK_SIZE,
            vq_embed_dim=CODEBOOK_DIM,
            norm_num_groups=8,
        )

    def reconstruct(self, image: Tensor) -> tuple[Tensor, Tensor]:
        out = self.model(image)
        return out.sample, out.commit_loss.mean()

    @property
    def last_layer(self) -> nn.Parameter:
        return self.model.decoder.conv_out.weight

    def update_codebook(self) -> None:
        """The optimizer has done it."""


class Ours(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = Autoencoder(
            resolution=RESOLUTION,
            channels=CHANNELS,
            channel_mult=CHANNEL_MULT,
            num_res_blocks=1,
            attention_resolutions=(RESOLUTION >> (len(CHANNEL_MULT) - 1),),
            latent_channels=LATENT_CHANNELS,
            bottleneck={"kind": "vq_ema", "codebook_size": CODEBOOK_SIZE, "codebook_dim": CODEBOOK_DIM},
        )
        self.generator = torch.Generator()

    def reconstruct(self, image: Tensor) -> tuple[Tensor, Tensor]:
        reconstruction, self.encoded = self.model(image)
        return reconstruction, self.encoded.losses["commitment_loss"]

    @property
    def last_layer(self) -> nn.Parameter:
        return self.model.last_layer

    def update_codebook(self) -> None:
        latents, indices = self.encoded.latents, self.encoded.indices
        self.model.bottleneck.update_codebook(latents, indices=indices, generator=self.generator)


def make_step(tokenizer: Ours | Peer, *, memory_format: torch.memory_format, adversarial: bool) -> Step:
    """A closure that trains the tokenizer on one fixed batch, in the given memory format, against a discriminator or
    by reconstruction alone."""
    torch.manual_seed(0)
    discriminator, perceptual = PatchDiscriminator(channels=32), PerceptualLoss(Features())
    for module in (tokenizer, discriminator, perceptual):
        module.to(memory_format=memory_format)
    image = torch.rand(BATCH_SIZE, 3, RESOLUTION, RESOLUTION).mul_(2).sub_(1).contiguous(memory_format=memory_format)
    trained = (tokenizer, discriminator) if adversarial else (tokenizer,)
    optimizers = [torch.optim.Adam(module.parameters(), lr=1e-4, betas=(0.5, 0.9)) for module in trained]

    def against_discriminator(reconstruction: Tensor) -> Tensor:
        fake_logits = discriminator(reconstruction)
        balanced = balanced_generator_loss(
            reconstruction,
            nll_loss=reconstruction_loss(reconstruction, image=image) + perceptual(reconstruction, image).mean(),
            adversarial_loss=generator_loss(fake_logits),
            last_layer=tokenizer.last_layer,
            adversarial_weight=0.8,
        )
        hinge = hinge_discriminator_loss(discriminator(image), fake_logits=fake_logits)
        hinge.backward(inputs=list(discriminator.parameters()), retain_graph=True)
        return balanced.loss

    def step() -> None:
        for optimizer in optimizers:
            optimizer.zero_grad()
        reconstruction, commitment_loss = tokenizer.reconstruct(image)
        judge = against_discriminator if adversarial else partial(reconstruction_loss, image=image)
        loss = judge(reconstruction) + COMMITMENT_COST * commitment_loss
        loss.backward(inputs=[p for p in tokenizer.parameters() if p.requires_grad])
        for optimizer in optimizers:
            optimizer.step()
        tokenizer.update_codebook()

    return step


@contextmanager
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def measure(steps: dict[str, Step], *, rounds: int) -> dict[str, tuple[float, float]]:
    """Median wall and CPU seconds of each step, taken in turn, after one round that does not count."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for _ in range(rounds + 1):
        for name, step in steps.items():
            wall, cpu = time.perf_counter(), time.process_time()
            step()
            times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return {
        name: (statistics.median(w for w, _ in pairs[1:]), statistics.median(c for _, c in pairs[1:]))
        for name, pairs in times.items()
    }


def rows(rounds: int) -> list[dict[str, Any]]:
    """Both steps of each side in its faster memory format, at least nine times each."""
    return [
        measured_row("vqgan_step", rounds, adversarial=True),
        measured_row("autoencoder_step", rounds, adversarial=False),
    ]


def measured_row(name: str, rounds: int, *, adversarial: bool) -> dict[str, Any]:
    formats = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
    steps = {
        f"{side.__name__} {layout}": make_step(side(), memory_format=memory_format, adversarial=adversarial)
        for layout, memory_format in formats.items()
        for side in (Ours, Peer)
    }
    with one_thread():
        times = measure(steps, rounds=max(rounds, 9))
    ours, peer = (min(times[f"{side} {layout}"] for layout in formats) for side in ("Ours", "Peer"))
    return {
        "name": name,
        "ours": ours[0],
        "peer": peer[0],
        "ratio": ours[0] / peer[0],
        "unit": "s",
        "cpu_ours": ours[1],
        "cpu_peer": peer[1],
    }
