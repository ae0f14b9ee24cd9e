"""Training of the VQ-GAN tokenizer (Esser et al., 2021): two networks, two optimizers, one codebook.

Shapes: B batch, H W pixels, h w latent grid, N = B*h*w latents, C codebook_dim.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from components.losses.adversarial import (
    GeneratorLoss,
    adaptive_weight,
    balanced_generator_loss,
    generator_loss,
    hinge_discriminator_loss,
)
from components.losses.reconstruction import reconstruction_loss
from components.models.autoencoder import VQAutoencoder
from components.models.discriminator import PatchDiscriminator
from components.models.quantizer import (
    EMAQuantizer,
    Quantized,
    codebook_histogram,
    codebook_perplexity,
    codebook_usage,
)
from components.training.batches import to_batch, with_positions
from components.training.config import TokenizerConfig
from components.training.learner import Learner, accumulated, below, seeded, split
from components.training.loop import Arrays, Batch, Metrics
from components.training.parallel import ALONE, Worker, average
from components.training.perceptual_weights import load_perceptual_loss
from components.training.previews import png_grid
from components.training.randomness import step_generator

PREVIEW_SAMPLES = 8
EVALUATION_BATCH = 64


class Losses(NamedTuple):
    """Of one part of a batch; losses are () and fp32."""

    reconstruction: Tensor  # (B, 3, H, W)
    quantized: Quantized
    reconstruction_loss: Tensor
    perceptual_loss: Tensor
    nll_loss: Tensor  # reconstruction + weighted perceptual
    adversarial_loss: Tensor  # of the generator
    discriminator_loss: Tensor


def autoencoder_arguments(config: TokenizerConfig) -> dict[str, Any]:
    """Arguments of the autoencoder for this recipe; plain values, they go into the bundle."""
    return {
        "resolution": config.resolution,
        "channels": config.channels,
        "channel_mult": list(config.channel_mult),
        "num_res_blocks": config.num_res_blocks,
        "attention_resolutions": list(config.attention_resolutions),
        "latent_channels": config.latent_channels,
        "codebook_size": config.codebook_size,
        "codebook_dim": config.codebook_dim,
        "ema_decay": config.codebook_decay,
    }


class TokenizerTask:
    """Autoencoder against discriminator. Only the autoencoder is kept; its codebook moves after each step taken."""

    def __init__(
        self, config: TokenizerConfig, *, worker: Worker = ALONE, max_batch_per_device: int | None = None
    ) -> None:
        self.config, self.worker, self.max_batch = config, worker, max_batch_per_device
        with seeded(config.seed):
            autoencoder = VQAutoencoder(**autoencoder_arguments(config))
            discriminator = PatchDiscriminator(
                channels=config.discriminator_channels, num_layers=config.discriminator_layers
            )
        for network in (autoencoder, discriminator):
            network.to(memory_format=torch.channels_last)  # pyrefly: ignore[no-matching-overload]
        self.generator = Learner(autoencoder, config=config, worker=worker, ema_decay=config.ema_decay)
        self.discriminator = Learner(discriminator, config=config, worker=worker, ema_decay=0)
        self.perceptual = load_perceptual_loss(config.perceptual_network, weights_uri=config.perceptual_weights_uri)
        if self.perceptual is not None:
            self.perceptual.to(worker.device, memory_format=torch.channels_last)  # pyrefly: ignore[no-matching-overload]

    def train_step(self, batch: Batch, step: int) -> Metrics:
        """Both networks see the same reconstructions, and the discriminator learns from step 1: one that is untrained
        when the generator begins to hear it ruins reconstructions (taming-transformers issue 93).
        """
        adversarial = step > self.config.discriminator_start and self.config.adversarial_weight > 0
        in_parts = self.max_batch is not None and self.max_batch < len(batch["position"])
        ratio = self.adaptive_weight_of(batch) if adversarial and in_parts else None
        totals: Metrics = {}
        latents, indices = [], []
        for part, share in accumulated(batch, self.generator, self.discriminator, max_batch=self.max_batch, step=step):
            metrics, quantized = self.backward(part, share, adversarial=adversarial, ratio=ratio)
            totals = {name: totals.get(name, 0.0) + value.detach() * share for name, value in metrics.items()}
            latents.append(quantized.latents)
            indices.append(quantized.indices)
        taken, norm = self.generator.update(step)
        self.discriminator.update(step)
        if taken:
            totals["dead_codes"] = self.quantizer.update_codebook(
                torch.cat(latents),
                indices=torch.cat(indices),
                generator=step_generator(self.config.seed, step, stream="codebook"),
            ).float()
            self.generator.average()
        return totals | {"grad_norm": norm, "codebook_perplexity": self.quantizer_perplexity()}

    def backward(
        self, part: Batch, share: float, *, adversarial: bool, ratio: Tensor | None
    ) -> tuple[Metrics, Quantized]:
        """Add the gradients of one part to both networks. `ratio` is the adaptive weight, if not that of this part."""
        with self.generator.autocast():
            losses = self.losses(part, self.generator.forward, self.discriminator.forward, adversarial=adversarial)
        weight = self.config.adversarial_weight
        if not adversarial:
            balanced = GeneratorLoss(losses.nll_loss, torch.zeros_like(losses.nll_loss))
        elif ratio is None:
            balanced = balanced_generator_loss(
                losses.reconstruction,
                nll_loss=losses.nll_loss,
                adversarial_loss=losses.adversarial_loss,
                last_layer=self.generator.network.last_layer,
                adversarial_weight=weight,
            )
        else:
            balanced = GeneratorLoss(losses.nll_loss + weight * ratio * losses.adversarial_loss, ratio)
        loss = balanced.loss + self.config.commitment_cost * losses.quantized.commitment_loss
        self.discriminator.backward(losses.discriminator_loss * share, retain_graph=True)
        self.generator.backward(loss * share)
        metrics = {
            "loss": loss,
            "reconstruction_loss": losses.reconstruction_loss,
            "perceptual_loss": losses.perceptual_loss,
            "commitment_loss": losses.quantized.commitment_loss,
            "adversarial_loss": losses.adversarial_loss,
            "discriminator_loss": losses.discriminator_loss,
            "adaptive_weight": balanced.adaptive_weight,
        }
        return metrics, losses.quantized

    def losses(self, part: Batch, autoencoder: nn.Module, discriminator: nn.Module, *, adversarial: bool) -> Losses:
        """All terms of one part. One pass of the discriminator over real and reconstructed pictures serves both sides;
        its norms keep pictures apart."""
        image = part["image"]
        reconstruction, quantized = autoencoder(image)
        difference = reconstruction_loss(reconstruction, image=image)
        perceptual = torch.zeros_like(difference)
        if self.perceptual is not None:
            perceptual = self.perceptual(reconstruction, image).mean()
        judged = reconstruction if adversarial else reconstruction.detach()
        real_logits, fake_logits = discriminator(torch.cat([image.to(judged.dtype), judged])).chunk(2)
        return Losses(
            reconstruction=reconstruction,
            quantized=quantized,
            reconstruction_loss=difference,
            perceptual_loss=perceptual,
            nll_loss=difference + self.config.perceptual_weight * perceptual,
            adversarial_loss=generator_loss(fake_logits),
            discriminator_loss=hinge_discriminator_loss(real_logits, fake_logits=fake_logits),
        )

    def adaptive_weight_of(self, batch: Batch) -> Tensor:
        """The adaptive weight (Esser et al., 2021, equation 7) of a batch that is trained on in parts.

        It is a ratio of norms of the whole batch's gradients, so it takes a pass over all parts before the real one.
        """
        last_layer = self.generator.network.last_layer
        sums = [torch.zeros_like(last_layer), torch.zeros_like(last_layer)]
        for part in split(batch, self.max_batch):
            share = len(part["position"]) / len(batch["position"])
            with self.generator.autocast():
                losses = self.losses(part, self.generator.network, self.discriminator.network, adversarial=True)
            for total, loss in zip(sums, (losses.nll_loss, losses.adversarial_loss), strict=True):
                total += torch.autograd.grad(loss, last_layer, retain_graph=True)[0] * share
        nll_gradient, adversarial_gradient = (average(total, self.worker) for total in sums)
        return adaptive_weight(nll_gradient, adversarial_gradient=adversarial_gradient)

    @property
    def quantizer(self) -> EMAQuantizer:
        return self.generator.network.quantizer

    def quantizer_perplexity(self) -> Tensor:
        """Perplexity of the codes' running counts, (): over the last 1 / (1 - codebook_decay) batches of all ranks."""
        return codebook_perplexity(self.quantizer.ema_count).float()

    def state_dict(self) -> dict[str, Any]:
        weights = {f"generator.{name}": tensor for name, tensor in self.generator.weights().items()}
        weights |= {f"discriminator.{name}": tensor for name, tensor in self.discriminator.weights().items()}
        return {
            "weights": weights,
            "generator": self.generator.progress(),
            "discriminator": self.discriminator.progress(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.generator.restore(below("generator.", state["weights"]), state["generator"])
        self.discriminator.restore(below("discriminator.", state["weights"]), state["discriminator"])

    @torch.no_grad()
    def evaluate(self, held_out: Arrays) -> dict[str, float]:
        """Losses, codebook usage and perplexity of the averaged weights over all held-out pictures."""
        batch = with_positions(to_batch(held_out, self.worker.device))
        totals = {"reconstruction_loss": 0.0, "perceptual_loss": 0.0}
        network = self.generator.snapshot()
        histogram = torch.zeros(self.config.codebook_size, dtype=torch.int64, device=self.worker.device)
        for part in split(batch, self.max_batch or EVALUATION_BATCH):
            losses = self.losses(part, network, self.discriminator.network, adversarial=False)
            share = len(part["position"]) / len(batch["position"])
            for name in totals:
                totals[name] += float(getattr(losses, name)) * share
            histogram += codebook_histogram(losses.quantized.indices, codebook_size=self.config.codebook_size)
        usage, perplexity = codebook_usage(histogram), codebook_perplexity(histogram)
        return {
            **{f"held_out_{name}": value for name, value in totals.items()},
            "held_out_codebook_usage": float(usage),
            "held_out_codebook_perplexity": float(perplexity),
        }

    @torch.no_grad()
    def preview(self, held_out: Arrays, step: int) -> dict[str, bytes]:
        """Held-out pictures above their reconstructions."""
        image = to_batch({"image": held_out["image"][:PREVIEW_SAMPLES]}, self.worker.device)["image"]
        reconstruction, _ = self.generator.snapshot()(image)
        return {"reconstructions": png_grid(torch.cat([image, reconstruction]), columns=len(image))}
