"""Training of contrastive text-image encoders (Radford et al., 2021, section 2).

The loss sees the pairs of all ranks and of all parts of a batch together, so two ranks equal one and accumulation
equals none. A batch taken in parts is encoded twice: once for the pairs of other parts, once for the gradients.

Shapes: B pairs on this rank, N pairs of all ranks, E embedding_dim, L text length.
"""

from typing import Any

import torch
from torch import Tensor, nn

from components.configuration.conditions import DatasetInfo
from components.configuration.trainings import ContrastiveTraining
from components.models.contrastive import Embeddings
from components.models.losses.cross_entropy import (
    ContrastiveGradients,
    along_gradient,
    contrastive_gradients,
    contrastive_loss,
)
from components.training.augmentation import shifted
from components.training.batches import to_batch, with_positions
from components.training.building import make_network
from components.training.learner import Learner, LearnerTask, accumulated, held_out_parts, initialized, split
from components.training.loop import Arrays, Batch, Metrics
from components.training.parallel import ALONE, Worker, gather

ROUNDING = 1e-6  # of a cosine in float32: rows whose cosines differ by less are as near


class ContrastiveTask(LearnerTask[Any]):
    """Trains two encoders, of images and of texts, to agree."""

    gone_before_backward = ("gradients",)  # methods of which nothing is kept when a step goes backward

    def __init__(
        self,
        config: ContrastiveTraining,
        *,
        dataset_info: DatasetInfo,
        worker: Worker = ALONE,
    ) -> None:
        self.config, self.worker = config, worker
        self.seed = config.optimization.seed
        with initialized(config.optimization.seed, worker):
            network = make_network(config, dataset_info)
        self.learner = Learner(network, config=config.optimization, worker=worker)

    def train_step(self, batch: Batch, step: int) -> Metrics:
        gradients, done = self.gradients_in_parts(batch), 0
        for part, share in accumulated(batch, self.learner, max_batch=self.max_batch, step=step):
            embeddings = self.embed(self.learner.forward, part)
            gradients = self.gradients(embeddings) if gradients is None else gradients
            rows = slice(done, done + len(part["position"]))
            self.learner.backward(self.pull(embeddings, gradients, rows=rows, share=share))
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

    def gradients_in_parts(self, batch: Batch) -> ContrastiveGradients | None:
        """Loss and gradients of a batch taken in parts; None for a batch taken whole, without an extra pass."""
        parts = list(split(batch, self.max_batch))
        if len(parts) == 1:
            return None
        with torch.no_grad():
            images, texts, scales = zip(*(self.embed(self.learner.network, part) for part in parts), strict=True)
        return self.gradients(Embeddings(torch.cat(images), torch.cat(texts), scales[0]))

    def gradients(self, embeddings: Embeddings) -> ContrastiveGradients:
        """Loss over the N pairs of all ranks, and gradients at the B pairs of the calling rank."""
        image, text = (gather(tensor.detach(), self.worker) for tensor in (embeddings.image, embeddings.text))
        gradients = contrastive_gradients(image, text, log_scale=embeddings.log_scale)
        own = slice(self.worker.rank * len(embeddings.image), (self.worker.rank + 1) * len(embeddings.image))
        return gradients._replace(image=gradients.image[own], text=gradients.text[own])

    def pull(self, embeddings: Embeddings, gradients: ContrastiveGradients, *, rows: slice, share: float) -> Tensor:
        """A scalar for the backward pass of a part, with the loss's own gradients.

        Its gradients, added over parts and averaged over ranks, are those of the loss: each rank adds its own rows, and
        all ranks the same temperature.
        """
        image, text = gradients.image[rows], gradients.text[rows]
        towers = along_gradient(embeddings.image, image) + along_gradient(embeddings.text, text)
        return self.worker.world_size * towers + share * along_gradient(embeddings.log_scale, gradients.log_scale)

    @torch.no_grad()
    def evaluate(self, held_out: Arrays) -> dict[str, float]:
        """Loss of the averaged weights over all held-out pairs at once, and retrieval accuracies."""
        batch = with_positions(to_batch(held_out, self.worker.device))
        network = self.learner.snapshot()
        taken = held_out_parts(batch, self.learner, max_batch=self.max_batch)
        parts = [network(part["image"], part["text"]) for part in taken]
        image, text = torch.cat([part.image for part in parts]), torch.cat([part.text for part in parts])
        same = (batch["text"][:, None] == batch["text"]).all(dim=-1)  # (N, N) pairs with one and the same caption
        return {
            "held_out_loss": float(contrastive_loss(image, text, log_scale=network.log_scale)),
            "held_out_image_to_text": float(retrieval_accuracy(image, text, same=same)),
            "held_out_text_to_image": float(retrieval_accuracy(text, image, same=same)),
            "held_out_pairs": float(len(same)),
        }


def retrieval_accuracy(query: Tensor, candidates: Tensor, *, same: Tensor) -> Tensor:
    """Share of rows of `query` (N, E) with a right answer as the nearest row of `candidates` (N, E), ().

    Of several rows equally near, each counts for its share: the last bit of a product depends on the place of a row.

    Args:
        same: (N, N) bool, true where j is a right answer to i: on the diagonal, and for equal captions.
    """
    cosine = query @ candidates.T  # (N, N)
    nearest = cosine >= cosine.amax(dim=1, keepdim=True) - ROUNDING
    return ((nearest & same).sum(dim=1) / nearest.sum(dim=1)).mean()
