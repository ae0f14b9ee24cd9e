"""Training of autoencoders: VAE, VAE-GAN, VQ-VAE, dVAE or VQ-GAN, by the weights of the losses.
VQ-GAN: Esser et al. (2021). With an adversarial weight there are two networks and two optimizers; without one no
discriminator is built.
Shapes: B batch, H W pixels, O channels of the decoder's output, h w latent grid, N = B*h*w latents, K codes."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from components.configuration.trainings import AutoencoderTraining
from components.models.bottleneck import (
    EMAQuantizer,
    Encoded,
    GumbelQuantizer,
    VectorQuantizer,
    codebook_histogram,
    codebook_perplexity,
    codebook_usage,
    draw_latents,
    gather_over_ranks,
)
from components.models.losses.adversarial import (
    GeneratorLoss,
    adaptive_weight,
    balanced_generator_loss,
    generator_loss,
    hinge_discriminator_loss,
)
from components.models.losses.reconstruction import image_of, reconstruction_loss
from components.training.learner import AdversarialTask, add, split
from components.training.loop import Arrays, Batch, Metrics
from components.training.optim import kl_weight_at, temperature_at
from components.training.parallel import average
from components.training.randomness import step_generator
from components.weights.perceptual import load_perceptual_loss
from components.weights.starts import is_below


class Losses(NamedTuple):
    """Losses of the autoencoder over a part of a batch, each () and fp32."""

    image: Tensor  # (B, 3, H, W), gray where the network has one channel or reads a map of classes
    output: Tensor  # (B, O, H, W)
    encoded: Encoded
    terms: dict[str, Tensor]  # every loss of the autoencoder by name
    nll_loss: Tensor  # reconstruction + weighted perceptual


class AutoencoderTask(AdversarialTask):
    """Autoencoder, which alone is stored, and, with an adversarial weight, discriminator."""

    config: AutoencoderTraining
    previews = "reconstructions"

    def make_learners(self) -> None:
        super().make_learners()
        network = self.config.network
        self.reconstruction = network.reconstruction
        self.num_values = network.image_channels * self.config.data.resolution**2
        losses = self.config.losses
        network = losses.perceptual_network if losses.perceptual_weight > 0 else "none"
        self.perceptual = load_perceptual_loss(network, weights_uri=losses.perceptual_weights_uri)
        if self.perceptual is not None:
            device = self.worker.device
            self.perceptual.to(device, memory_format=torch.channels_last)  # pyrefly: ignore[no-matching-overload]

    def train_step(self, batch: Batch, step: int) -> Metrics:
        """Train both networks on the same reconstructions. The discriminator learns from step 1.
        An untrained one would ruin reconstructions once the generator hears it (taming-transformers issue 93)."""
        start = self.config.init_from
        if step == 1 and (start is None or is_below("bottleneck", start.ignore)):
            self.start_codes(batch)
        in_parts = self.max_batch is not None and self.max_batch < len(batch["position"])
        ratio = self.adaptive_weight_of(batch, step) if in_parts and self.is_heard(step) else None
        totals: Metrics = {}
        latents: list[Encoded] = []
        for part, share in self.accumulated(batch, *self.learners.values(), step=step):
            metrics, encoded = self.backward(part, share, step=step, ratio=ratio)
            add(totals, metrics, share)
            latents.append(encoded)
        taken, norm = self.generator.update(step)
        if self.discriminator is not None:
            self.discriminator.update(step)
        totals |= self.update_codebook(latents, step, taken)
        self.generator.average(taken)
        return totals | {"grad_norm": norm}

    def backward(self, part: Batch, share: float, *, step: int, ratio: Tensor | None) -> tuple[Metrics, Encoded]:
        """Add the gradients of a part to both networks.
        `ratio` is the adaptive weight of the whole batch; None: of the part."""
        with self.generator.autocast():
            losses = self.losses(part, self.generator.forward, self.draws(part, step=step))
        loss, metrics = losses.nll_loss, dict(losses.terms)
        if self.discriminator is not None:
            with self.generator.autocast():
                judged = self.judge(losses.image, losses.output, self.discriminator.forward, step=step)
            balanced = self.balance(losses, judged["adversarial_loss"], step=step, ratio=ratio)
            self.discriminator.backward(judged["discriminator_loss"] * share, retain_graph=True)
            loss = balanced.loss
            metrics |= {**judged, "adaptive_weight": balanced.adaptive_weight}
        # Reconstruction is a mean over all values of an image, so the KL divergence, in nats an image, is divided
        # by as many: with kl_weight 1 their sum is the bound a dimension.
        weights = {
            "codebook_loss": 1.0,
            "commitment_loss": self.config.losses.commitment_cost,
            "kl_loss": kl_weight_at(self.config.losses, step) / self.num_values,
        }
        for name, value in losses.encoded.losses.items():
            loss = loss + weights[name] * value
        self.generator.backward(loss * share)
        return {"loss": loss, **metrics}, losses.encoded

    def losses(self, part: Batch, autoencoder: nn.Module, draws: dict[str, Tensor | float]) -> Losses:
        """The autoencoder's losses over a part, by a network and draws of the bottleneck."""
        planes = self.generator.network.planes(part["image"])
        output, encoded = autoencoder(part["image"], **draws)
        nll_loss = reconstruction_loss(output, image=planes, kind=self.reconstruction)
        image = part["image"] if self.reconstruction == "classes" else colors(planes)
        terms = {"reconstruction_loss": nll_loss}
        if self.perceptual is not None:
            terms["perceptual_loss"] = self.perceptual(self.decoded(output), image).mean()
            nll_loss = nll_loss + self.config.losses.perceptual_weight * terms["perceptual_loss"]
        return Losses(image, output, encoded, terms | encoded.losses, nll_loss)

    def judge(self, image: Tensor, output: Tensor, discriminator: nn.Module, *, step: int) -> Metrics:
        """Losses of both sides, () fp32, by a pass of the discriminator over real and reconstructed images.
        The discriminator's norms keep images apart, so the pass equals two."""
        judged = self.decoded(output if self.is_heard(step) else output.detach())
        real_logits, fake_logits = discriminator(torch.cat([image.to(judged.dtype), judged])).chunk(2)
        discriminator_loss = hinge_discriminator_loss(real_logits, fake_logits=fake_logits)
        return {"adversarial_loss": generator_loss(fake_logits), "discriminator_loss": discriminator_loss}

    def balance(self, losses: Losses, adversarial: Tensor, *, step: int, ratio: Tensor | None) -> GeneratorLoss:
        """Reconstruction and perceptual loss, and from discriminator_start on the adversarial loss."""
        weight = self.config.losses.adversarial_weight
        if not self.is_heard(step):
            return GeneratorLoss(losses.nll_loss, torch.zeros_like(losses.nll_loss))
        if ratio is not None:
            return GeneratorLoss(losses.nll_loss + weight * ratio * adversarial, ratio)
        return balanced_generator_loss(
            losses.output,
            nll_loss=losses.nll_loss,
            adversarial_loss=adversarial,
            last_layer=self.generator.network.last_layer,
            adversarial_weight=weight,
        )

    def adaptive_weight_of(self, batch: Batch, step: int) -> Tensor:
        """The adaptive weight (Esser et al., 2021, equation 7) of a batch, by a pass over its parts."""
        assert self.discriminator is not None
        last_layer = self.generator.network.last_layer
        sums = [torch.zeros_like(last_layer), torch.zeros_like(last_layer)]
        for part, share in split(batch, self.max_batch):
            with self.generator.autocast():
                losses = self.losses(part, self.generator.network, self.draws(part, step=step))
                judged = self.judge(losses.image, losses.output, self.discriminator.network, step=step)
            for total, loss in zip(sums, (losses.nll_loss, judged["adversarial_loss"]), strict=True):
                total += torch.autograd.grad(loss, last_layer, retain_graph=True)[0] * share
        nll_gradient, adversarial_gradient = (average(total, self.worker) for total in sums)
        return adaptive_weight(nll_gradient, adversarial_gradient=adversarial_gradient)

    def is_heard(self, step: int) -> bool:
        """True if the adversarial loss counts in `step`."""
        return self.discriminator is not None and step > self.config.losses.discriminator_start

    def draws(self, part: Batch, *, step: int | None) -> dict[str, Tensor | float]:
        """Random arguments of the bottleneck for a part; step None: of an evaluation, with hard codes."""
        network, position = self.generator.network, part["position"]
        stream = "latent" if step is not None else "latent_held_out"
        if self.config.network.bottleneck.kind == "gaussian":
            return {"noise": self.draw.normal(position, stream, network.latent_shape)}
        if self.config.network.bottleneck.kind == "gumbel" and step is not None:
            shape = (network.codebook_size, *network.grid)
            temperature = temperature_at(self.config.losses, step)
            return {"noise": self.draw.gumbel(position, stream, shape), "temperature": temperature}
        return {}

    def decoded(self, output: Tensor) -> Tensor:
        """Images (B, 3, H, W) of the decoder's output (B, O, H, W)."""
        return colors(image_of(output, kind=self.reconstruction))

    @torch.no_grad()
    def start_codes(self, batch: Batch) -> None:
        """Start codes with a gradient at features of the first batch of all ranks, for codebook_init "data"."""
        network, own = self.generator.network, []
        quantizer = network.bottleneck
        if not isinstance(quantizer, GumbelQuantizer | VectorQuantizer) or quantizer.codebook_init != "data":
            return
        for part, _ in split(batch, self.max_batch):
            own.append(rearrange(network.encoder(network.planes(part["image"])), "b c h w -> (b h w) c"))
        features = gather_over_ranks(torch.cat(own), cells=math.prod(network.grid))
        generator = step_generator(self.seed, 1, stream="codebook")
        centers = draw_latents(features, network.codebook_size, generator=generator)
        quantizer.start_at(centers, project_in=network.project_in)

    def update_codebook(self, parts: list[Encoded], step: int, taken: Tensor) -> Metrics:
        """Move an EMA codebook, if there is one, by the latents of the whole batch, if the step was taken."""
        quantizer = self.generator.network.bottleneck
        if not isinstance(quantizer, EMAQuantizer):
            return {}
        dead = quantizer.update_codebook(
            torch.cat([part.latents for part in parts if part.latents is not None]),
            indices=torch.cat([part.indices for part in parts if part.indices is not None]),
            generator=step_generator(self.seed, step, stream="codebook"),
            taken=taken,
        )
        perplexity = codebook_perplexity(quantizer.ema_count)  # of all ranks
        return {"dead_codes": dead.float(), "codebook_perplexity": perplexity.float()}

    @torch.no_grad()
    def evaluate(self, held_out: Arrays) -> dict[str, float]:
        """Losses of the averaged weights over all held-out images.
        With codes also usage and perplexity of the codebook, with a likelihood the bound in bits per dimension."""
        network, indices, totals = self.generator.snapshot(), list[Tensor](), dict[str, float]()
        for part, share in self.held_out_parts(held_out):
            losses = self.losses(part, network, self.draws(part, step=None))
            add(totals, {name: float(value) for name, value in losses.terms.items()}, share)
            indices += [] if losses.encoded.indices is None else [losses.encoded.indices]
        metrics = {f"held_out_{name}": value for name, value in totals.items()}
        if indices:
            histogram = codebook_histogram(torch.cat(indices), codebook_size=network.codebook_size)
            metrics["held_out_codebook_usage"] = float(codebook_usage(histogram))
            metrics["held_out_codebook_perplexity"] = float(codebook_perplexity(histogram))
        if self.reconstruction == "discretized_logistic":
            metrics["held_out_bits_per_dim"] = self.bits_per_dim(totals)
        return metrics

    def bits_per_dim(self, terms: dict[str, float]) -> float:
        """Upper bound on the bits of each 8-bit value: reconstruction plus the cost of z under the prior.
        A Gaussian costs its KL divergence from N(0, I). Codes are decided by the image and uniform under their prior:
        log K each, independent of the relaxation's divergence."""
        network = self.generator.network
        if self.config.network.bottleneck.kind == "gaussian":
            nats = terms["kl_loss"]
        else:
            nats = math.prod(network.grid) * math.log(network.codebook_size)
        return (terms["reconstruction_loss"] + nats / self.num_values) / math.log(2)

    def shown(self, parts: Iterator[Batch]) -> Iterator[list[Tensor]]:
        """Held-out images above their reconstructions; for a Gaussian, images of its prior below."""
        network = self.generator.snapshot()
        for part in parts:
            rows = [part["image"], colors(network.reconstruct(part["image"]))]
            if self.config.network.bottleneck.kind == "gaussian":
                z = self.draw.normal(part["position"], "preview", network.latent_shape)
                rows.append(colors(network.decode(z)))
            yield rows


def colors(image: Tensor) -> Tensor:
    """Channels (B, 1 or 3, H, W) as colors (B, 3, H, W), or gray."""
    return image.expand(-1, 3, -1, -1)
