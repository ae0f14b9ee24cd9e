"""Training of class-conditional GANs (Brock et al., 2019): two networks and optimizers, hinge losses.
Shapes: B batch, Z noise_dim, H W pixels."""

from collections.abc import Iterator
from copy import deepcopy
from itertools import chain
from typing import Any

import torch
from einops import repeat
from torch import Tensor, nn

from components.configuration.trainings import GANTraining
from components.models.gan import GANGenerator, estimate_statistics, settle_spectral_norms
from components.models.losses.adversarial import DRAWS, augment, generator_loss, hinge_discriminator_loss
from components.training.batches import png_grid
from components.training.learner import PREVIEW_SAMPLES, AdversarialTask, add, split
from components.training.loop import Arrays, Batch, Metrics
from components.training.randomness import Draws

PREVIEW_ROWS = 10
STATISTICS_BATCHES, STATISTICS_BATCH = 16, 64  # of noise, to estimate the statistics of batch norms


class GANTask(AdversarialTask):
    """Generator against discriminator. Only the averaged generator is stored.
    Batch norm sees the batches of all ranks together, so two ranks equal one, and parts of a batch one by one, so that
    accumulation does not equal none."""

    config: GANTraining
    parts_matter = True
    finished: GANGenerator | None = None  # of the weights as they are; see `finish`

    def make_learners(self) -> None:
        """Raises ValueError if a rank's share of the batch does not divide by discriminator_steps."""
        batch, steps = self.config.optimization.global_batch_size, self.config.optimization.discriminator_steps
        if self.worker.share(batch) % steps:
            raise ValueError(
                f"global_batch_size {batch} must be a multiple of discriminator_steps {steps} times the "
                f"{self.worker.world_size} workers"
            )
        super().make_learners()

    def train_step(self, batch: Batch, step: int) -> Metrics:
        """Train the discriminator on `discriminator_steps` equal parts of the batch, then the generator once.
        A part is a block of the global batch, of which each rank has an equal share. Singular vectors move with each
        forward: after a refused update they are put back, for numbers that are not finite may have reached them."""
        before = [buffer.clone() for buffer in self.buffers()]
        turns = self.config.optimization.discriminator_steps
        taken, totals = [], Metrics()
        for turn in range(turns):
            part = {name: value.chunk(turns)[turn] for name, value in batch.items()}
            add(totals, self.train_discriminator(part, step), 1 / turns)
            taken.append(self.discriminator.update(step)[0])
        totals["generator_loss"] = self.train_generator(batch, step)
        moved, norm = self.generator.update(step)
        all_taken = torch.stack([moved, *taken]).all()
        for buffer, value in zip(self.buffers(), before, strict=True):
            buffer.copy_(torch.where(all_taken, buffer, value))
        self.generator.average(moved)
        self.finished = None
        return {"loss": totals["discriminator_loss"], **totals, "grad_norm": norm}

    def train_discriminator(self, batch: Batch, step: int) -> Metrics:
        """Add the gradients of the hinge loss. Generated images have the labels of the real images."""
        totals: Metrics = {}
        for part, share in self.accumulated(batch, self.discriminator, step=step):
            with torch.no_grad(), self.generator.autocast():
                fake = self.generate(self.generator.network, part, stream="discriminator_noise")
            seen = [self.augmented(part["image"], part, "real"), self.augmented(fake, part, "fake")]
            with self.discriminator.autocast():
                logits = self.judge(self.discriminator.forward, torch.cat(seen), part)
            real_logits, fake_logits = logits.chunk(2)
            loss = hinge_discriminator_loss(real_logits, fake_logits=fake_logits)
            self.discriminator.backward(loss * share)
            metrics = {"discriminator_loss": loss, "real_logits": real_logits.mean(), "fake_logits": fake_logits.mean()}
            add(totals, metrics, share)
        return totals

    def train_generator(self, batch: Batch, step: int) -> Tensor:
        """Add the gradients of the generator's loss, and return the loss, ()."""
        total = torch.zeros((), device=self.worker.device)
        for part, share in self.accumulated(batch, self.generator, step=step):
            with self.generator.autocast():
                fake = self.generate(self.generator.forward, part, stream="generator_noise")
                seen = self.augmented(fake, part, "generated")
                loss = generator_loss(self.judge(self.discriminator.network, seen, part)) * share
            self.generator.backward(loss)
            total += loss.detach()
        return total

    def generate(self, generator: nn.Module, part: Batch, *, stream: str) -> Tensor:
        """Images (B, 3, H, W) for the labels of a part, from noise by position."""
        noise = self.draw.normal(part["position"], stream, [self.config.network.noise_dim])
        return generator(noise, self.label_of(part))

    def label_of(self, part: Batch) -> Tensor | None:
        """Labels (B,) for the networks; None without class conditioning."""
        return part["label"] if self.config.conditioning.conditions else None

    def judge(self, discriminator: nn.Module, image: Tensor, part: Batch) -> Tensor:
        """Logits of images; labels of the part are repeated for several images a label."""
        label = self.label_of(part)
        return discriminator(image, None if label is None else label.repeat(len(image) // len(label)))

    def augmented(self, image: Tensor, part: Batch, stream: str) -> Tensor:
        """Images for the discriminator in training: fp32, augmented if the recipe has augmentation."""
        if not self.config.adversary.augment:
            return image.float()
        draws = [Draws(self.seed).uniform(part["position"], f"augment_{stream}_{name}") for name in DRAWS]
        return augment(image.float(), draws=torch.stack(draws, dim=1))

    def buffers(self) -> Iterator[Tensor]:
        return chain(self.generator.network.buffers(), self.discriminator.network.buffers())

    def finish(self) -> GANGenerator:
        """The averaged generator for sampling: a copy with its own singular vectors and batch statistics.
        A function of the weights and the seed alone, made on each rank separately. Training never uses it."""
        if self.finished is None:
            network = deepcopy(self.generator.snapshot())
            settle_spectral_norms(network)
            estimate_statistics(network, self.statistics_noise())
            self.finished = network
        return self.finished

    def statistics_noise(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Noise (B, Z) and labels (B,), all classes equally likely, for batch statistics: always the same."""
        positions = torch.arange(STATISTICS_BATCHES * STATISTICS_BATCH)
        for position in positions.split(STATISTICS_BATCH):
            noise = self.draw.normal(position, "statistics_noise", [self.config.network.noise_dim])
            label = self.draw.integers(position, "statistics_label", high=self.dataset_info.num_classes)
            yield noise, self.label_of({"label": label})

    def state_dict(self) -> dict[str, Any]:
        """State of both networks; the average in its sampling form, see `finish`."""
        state = super().state_dict()
        state["weights"] |= {f"generator.ema.{name}": tensor for name, tensor in self.finish().state_dict().items()}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore both networks; buffers of the average become those of the network, as during training."""
        super().load_state_dict(state)
        for average, own in zip(self.generator.snapshot().buffers(), self.generator.network.buffers(), strict=True):
            average.copy_(own)
        self.finished = None

    @torch.no_grad()
    def evaluate(self, held_out: Arrays) -> dict[str, float]:
        """Losses and mean logits of held-out images against as many generated images, not augmented."""
        generator, discriminator, logits = self.finish(), self.discriminator.snapshot(), []
        for part, _ in self.held_out_parts(held_out):
            fake = self.generate(generator, part, stream="evaluation_noise")
            logits.append(self.judge(discriminator, torch.cat([part["image"], fake]), part).chunk(2))
        real_logits, fake_logits = (torch.cat(side) for side in zip(*logits, strict=True))
        return {
            "held_out_discriminator_loss": float(hinge_discriminator_loss(real_logits, fake_logits=fake_logits)),
            "held_out_generator_loss": float(generator_loss(fake_logits)),
            "held_out_real_logits": float(real_logits.mean()),
            "held_out_fake_logits": float(fake_logits.mean()),
        }

    @torch.no_grad()
    def preview(self, held_out: Arrays, step: int) -> dict[str, bytes]:
        """A row of samples for each of the first classes, from the same noise in each row."""
        del held_out, step
        config, device = self.config, self.worker.device
        classes = min(self.dataset_info.num_classes, PREVIEW_ROWS) if config.conditioning.conditions else 1
        position = torch.arange(PREVIEW_SAMPLES)
        noise = self.draw.normal(position, "preview", [config.network.noise_dim])
        label = repeat(torch.arange(classes, device=device), "rows -> (rows columns)", columns=PREVIEW_SAMPLES)
        batch = {"noise": noise.repeat(classes, 1), "label": label, "position": position.repeat(classes)}
        parts = split(batch, self.samples_at_once)
        images = [self.finish()(part["noise"], self.label_of(part)) for part, _ in parts]
        return {"samples": png_grid(torch.cat(images), columns=PREVIEW_SAMPLES)}
