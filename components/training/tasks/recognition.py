"""Training of networks that judge images: classifiers, and contrastive text-image encoders.

Classifiers of noised or clean images: Dhariwal and Nichol (2021), section 4 and appendix H. Contrastive encoders:
Radford et al. (2021), section 2. Their loss sees the pairs of all ranks and of all parts of a batch together, so two
ranks equal one and accumulation equals none. A batch taken in parts is encoded twice: once for the pairs of other
parts, once for the gradients.

Shapes: B images or pairs on this rank, N pairs of all ranks, K classes, H W pixels, E embedding_dim, L text length."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from components.configuration.trainings import ClassifierTraining, ContrastiveTraining
from components.models.contrastive import Embeddings
from components.models.losses.cross_entropy import (
    ContrastiveGradients,
    along_gradient,
    contrastive_gradients,
    contrastive_loss,
)
from components.training.learner import LearnerTask, split
from components.training.loop import Arrays, Batch, Metrics
from components.training.parallel import gather
from components.training.randomness import mirrored, shifted

LEVELS = (0, 25, 50, 75)  # percent of the way to noise, where accuracy is measured


class ClassifierTask(LearnerTask):
    """Trains a network to tell the class of the image behind x_t."""

    config: ClassifierTraining

    def part_losses(self, part: Batch) -> Metrics:
        """Loss and accuracy of a part with shifted, mirrored and noised images."""
        logits = self.logits(self.learner.forward, self.augmented(part), part)
        return {"loss": F.cross_entropy(logits, part["label"]), "accuracy": accuracy(logits, part)}

    def augmented(self, part: Batch) -> Tensor:
        seed, position = self.seed, part["position"]
        image = shifted(part["image"], position, seed=seed, max_shift=self.config.data.max_shift)
        return mirrored(image, position, seed=seed) if self.config.data.mirror else image

    def logits(self, network: nn.Module, image: Tensor, part: Batch, *, level: float | None = None) -> Tensor:
        """Logits (B, K) fp32 of images, each noised to a random time, or to `level` (0 to 1)."""
        position = part["position"]
        uniform = self.draw.uniform(position, "timestep")
        if level is not None or not self.config.noisy:
            uniform = torch.full_like(uniform, level or 0.0)
        time, x_t = self.objective.times(uniform), image
        if self.config.noisy:
            x_t = self.objective.add_noise(image, self.draw.normal(position, "noise", image.shape[1:]), time)
        with self.autocast():
            logits = self.objective.apply(network, x_t.contiguous(memory_format=torch.channels_last), time)
        return logits.float()

    def measures(self, network: nn.Module, part: Batch) -> Metrics:
        """Loss and accuracies; these at time 0, and for a classifier of noised images at all LEVELS."""
        measured = {"held_out_loss": F.cross_entropy(self.logits(network, part["image"], part), part["label"])}
        for percent in LEVELS if self.config.noisy else LEVELS[:1]:
            logits = self.logits(network, part["image"], part, level=percent / 100)
            measured[f"held_out_accuracy_{percent}" if percent else "held_out_accuracy"] = accuracy(logits, part)
        return measured


def accuracy(logits: Tensor, part: Batch) -> Tensor:
    """Share of images with the largest logit at their class, ()."""
    return (logits.argmax(dim=1) == part["label"]).float().mean()


ROUNDING = 1e-6  # of a cosine in float32: nearer ones count as equal


class ContrastiveTask(LearnerTask):
    """Trains two encoders, of images and of texts, to agree."""

    config: ContrastiveTraining
    gone_before_backward = ("gradients",)  # methods of which nothing is kept when a step goes backward

    def train_step(self, batch: Batch, step: int) -> Metrics:
        """Take a step along the gradients of the loss over all pairs, part by part."""
        parts, gradients, done = [part for part, _ in split(batch, self.max_batch)], None, 0
        if len(parts) > 1:  # those of the whole batch, by a pass more
            with torch.no_grad():
                images, texts, scales = zip(*(self.embed(self.learner.network, part) for part in parts), strict=True)
            gradients = self.gradients(Embeddings(torch.cat(images), torch.cat(texts), scales[0]))
        for part, share in self.accumulated(batch, self.learner, step=step):
            embeddings = self.embed(self.learner.forward, part)
            gradients = self.gradients(embeddings) if gradients is None else gradients
            rows = slice(done, done + len(part["position"]))
            # The gradients of this scalar, added over parts and averaged over ranks, are those of the loss: each rank
            # adds its own rows, and all ranks the same temperature.
            towers = along_gradient(embeddings.image, gradients.image[rows])
            towers = towers + along_gradient(embeddings.text, gradients.text[rows])
            scale = share * along_gradient(embeddings.log_scale, gradients.log_scale)
            self.learner.backward(self.worker.world_size * towers + scale)
            done = rows.stop
        taken, norm = self.learner.update(step)
        self.learner.network.limit_scale()
        self.learner.average(taken)
        assert gradients is not None  # a batch has at least one part
        return {"loss": gradients.loss, "scale": self.learner.network.log_scale.detach().exp(), "grad_norm": norm}

    def embed(self, network: nn.Module, part: Batch) -> Embeddings:
        with self.learner.autocast():
            return network(self.augmented(part), part["text"])

    def augmented(self, part: Batch) -> Tensor:
        return shifted(part["image"], part["position"], seed=self.seed, max_shift=self.config.data.max_shift)

    def gradients(self, embeddings: Embeddings) -> ContrastiveGradients:
        """Loss over the N pairs of all ranks, and gradients at the B pairs of the calling rank."""
        image, text = (gather(tensor.detach(), self.worker) for tensor in (embeddings.image, embeddings.text))
        gradients = contrastive_gradients(image, text, log_scale=embeddings.log_scale)
        own = slice(self.worker.rank, None, self.worker.world_size)
        return gradients._replace(image=gradients.image[own], text=gradients.text[own])

    @torch.no_grad()
    def evaluate(self, held_out: Arrays) -> dict[str, float]:
        """Loss of the averaged weights over all held-out pairs at once, and retrieval accuracies."""
        network, parts = self.learner.snapshot(), [part for part, _ in self.held_out_parts(held_out)]
        embeddings = [network(part["image"], part["text"]) for part in parts]
        image, text = torch.cat([own.image for own in embeddings]), torch.cat([own.text for own in embeddings])
        captions = torch.cat([part["text"] for part in parts])
        same = (captions[:, None] == captions).all(dim=-1)  # (N, N) pairs with one and the same caption
        return {
            "held_out_loss": float(contrastive_loss(image, text, log_scale=network.log_scale)),
            "held_out_image_to_text": float(retrieval_accuracy(image, text, same=same)),
            "held_out_text_to_image": float(retrieval_accuracy(text, image, same=same)),
            "held_out_pairs": float(len(same)),
        }


def retrieval_accuracy(query: Tensor, candidates: Tensor, *, same: Tensor) -> Tensor:
    """Share of rows of `query` (N, E) with a right answer as the nearest row of `candidates` (N, E), ().
    Of several rows equally near, each counts for its share: the last bit of a product depends on the place of a row.
    `same`: (N, N) bool, true where j is a right answer to i: on the diagonal, and for equal captions."""
    cosine = query @ candidates.T  # (N, N)
    nearest = cosine >= cosine.amax(dim=1, keepdim=True) - ROUNDING
    return ((nearest & same).sum(dim=1) / nearest.sum(dim=1)).mean()
