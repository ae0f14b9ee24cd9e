"""One step of VQ-GAN training, ours against diffusers' VQModel inside the same step.

Both sides have the same discriminator, feature network, losses, adaptive weight and optimizers, batch 8 of 64 x 64, an
8 x 8 grid of 512 codes of 8 dimensions, fp32 on one thread, each in the faster of its two memory formats. Ours also
updates its codebook.
"""

from functools import partial

import torch
import torch.nn.functional as F
from diffusers import VQModel
from torch import Tensor, nn

from components.models.autoencoder import Autoencoder
from components.models.critics import PatchDiscriminator, PerceptualLoss
from components.models.devices import autocast
from components.models.losses.adversarial import balanced_generator_loss, generator_loss, hinge_discriminator_loss
from components.models.losses.reconstruction import reconstruction_loss
from tests.benchmarks.interleaving import Row, Step, interleaved, one_thread, raced

RESOLUTION, BATCH_SIZE, CHANNELS, CHANNEL_MULT = 64, 8, 32, (1, 2, 2, 4)
LATENT_CHANNELS, CODEBOOK_SIZE, CODEBOOK_DIM, COMMITMENT_COST = 128, 512, 8, 0.25


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

    def __init__(self, model: VQModel) -> None:
        super().__init__()
        self.model = model

    def reconstruct(self, image: Tensor) -> tuple[Tensor, Tensor]:
        out = self.model(image)
        return out.sample, out.commit_loss.mean()

    @property
    def last_layer(self) -> nn.Parameter:
        return self.model.decoder.conv_out.weight

    def update_codebook(self) -> None:
        """The optimizer has done it."""


def peer_model(channels: int, channel_mult: tuple[int, ...], **settings: int) -> VQModel:
    """With attention at the lowest resolution."""
    levels = len(channel_mult)
    return VQModel(
        block_out_channels=tuple(channels * mult for mult in channel_mult),
        down_block_types=("DownEncoderBlock2D",) * (levels - 1) + ("AttnDownEncoderBlock2D",),
        up_block_types=("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * (levels - 1),
        **settings,
    )


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
    return training_step(tokenizer, image, discriminator=discriminator if adversarial else None, perceptual=perceptual)


def training_step(
    tokenizer: Ours | Peer,
    image: Tensor,
    *,
    discriminator: PatchDiscriminator | None,
    perceptual: PerceptualLoss | None,
    bf16: bool = False,
    **optimizing: bool,
) -> Step:
    """A step on one batch, against a discriminator and by perceptual features where they are given.

    Args:
        image: (B, 3, H, W), where the networks are.
        bf16: networks under autocast.
        optimizing: further arguments of both optimizers.
    """
    trained = [tokenizer] if discriminator is None else [tokenizer, discriminator]
    optimizers = [torch.optim.Adam(module.parameters(), lr=1e-4, betas=(0.5, 0.9), **optimizing) for module in trained]
    casting = partial(autocast, image.device, enabled=bf16)

    def against_discriminator(reconstruction: Tensor) -> Tensor:
        with casting():
            fake_logits, real_logits = discriminator(reconstruction), discriminator(image)
        nll_loss = reconstruction_loss(reconstruction, image=image)
        balanced = balanced_generator_loss(
            reconstruction,
            nll_loss=nll_loss if perceptual is None else nll_loss + perceptual(reconstruction, image).mean(),
            adversarial_loss=generator_loss(fake_logits),
            last_layer=tokenizer.last_layer,
            adversarial_weight=0.8,
        )
        hinge = hinge_discriminator_loss(real_logits, fake_logits=fake_logits)
        hinge.backward(inputs=list(discriminator.parameters()), retain_graph=True)
        return balanced.loss

    def step() -> None:
        for optimizer in optimizers:
            optimizer.zero_grad()
        with casting():
            reconstruction, commitment_loss = tokenizer.reconstruct(image)
        judge = partial(reconstruction_loss, image=image) if discriminator is None else against_discriminator
        loss = judge(reconstruction) + COMMITMENT_COST * commitment_loss
        loss.backward(inputs=[p for p in tokenizer.parameters() if p.requires_grad])
        for optimizer in optimizers:
            optimizer.step()
        tokenizer.update_codebook()

    return step


def rows(rounds: int) -> list[Row]:
    """Both steps of each side in its faster memory format, at least nine times each."""
    found, formats = [], (torch.contiguous_format, torch.channels_last)
    sizes = {"layers_per_block": 1, "latent_channels": LATENT_CHANNELS, "norm_num_groups": 8}
    sizes |= {"num_vq_embeddings": CODEBOOK_SIZE, "vq_embed_dim": CODEBOOK_DIM}
    sides = (("ours", Ours), ("peer", lambda: Peer(peer_model(CHANNELS, CHANNEL_MULT, **sizes))))
    for name, adversarial in (("vqgan_step", True), ("autoencoder_step", False)):
        steps = {
            f"{side} {layout}": make_step(make(), memory_format=layout, adversarial=adversarial)
            for layout in formats
            for side, make in sides
        }
        with one_thread():
            found.append(raced(name, interleaved(steps, rounds=max(rounds, 9), warm_up=1)))
    return found
