"""Training of classifiers of noised images, or of clean images.

Dhariwal and Nichol (2021), section 4 and appendix H. Shapes: B batch, K classes, H W pixels.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from components.configuration.conditions import DatasetInfo
from components.configuration.trainings import ClassifierTraining
from components.models.diffusion.objective import make_objective
from components.training.augmentation import mirrored, shifted
from components.training.batches import to_batch, with_positions
from components.training.building import make_network
from components.training.learner import Learner, LearnerTask, accumulated, held_out_parts, initialized
from components.training.loop import Arrays, Batch, Metrics
from components.training.parallel import ALONE, Worker
from components.training.randomness import sample_normal, sample_uniform

LEVELS = (0, 25, 50, 75)  # percent of the way from the image to noise, where accuracy is measured


class ClassifierTask(LearnerTask[Any]):
    """Trains a network to tell the class of the image behind x_t."""

    def __init__(
        self,
        config: ClassifierTraining,
        *,
        dataset_info: DatasetInfo,
        worker: Worker = ALONE,
    ) -> None:
        self.config, self.worker, self.parts_matter = config, worker, config.network.dropout > 0
        self.seed = config.optimization.seed
        self.objective = make_objective(config.process.objective())
        with initialized(config.optimization.seed, worker):
            network = make_network(config, dataset_info)
        self.learner = Learner(network, config=config.optimization, worker=worker)

    def train_step(self, batch: Batch, step: int) -> Metrics:
        totals = torch.zeros(2, device=self.worker.device)
        for part, share in accumulated(batch, self.learner, max_batch=self.max_batch, step=step):
            loss, right = self.trained_loss(part)
            self.learner.backward(loss * share)
            totals += torch.stack([loss.detach(), right]) * share
        norm = self.learner.step(step)
        return {"loss": totals[0], "accuracy": totals[1], "grad_norm": norm}

    def trained_loss(self, part: Batch) -> tuple[Tensor, Tensor]:
        """Loss of a part, with shifted, mirrored and noised images, and accuracy, both ()."""
        logits = self.logits(self.learner.forward, self.augmented(part), part)
        return F.cross_entropy(logits, part["label"]), accuracy(logits, part)

    def augmented(self, part: Batch) -> Tensor:
        seed, position = self.seed, part["position"]
        image = shifted(part["image"], position, seed=seed, max_shift=self.config.data.max_shift)
        return mirrored(image, position, seed=seed) if self.config.data.mirror else image

    def logits(self, network: nn.Module, image: Tensor, part: Batch, *, level: float | None = None) -> Tensor:
        """Logits (B, K) fp32 of images, each noised to a random time, or to `level` (0 to 1)."""
        seed, position = self.seed, part["position"]
        uniform = sample_uniform(seed, position, stream="timestep", device=image.device)
        if level is not None or not self.config.noisy:
            uniform = torch.full_like(uniform, level or 0.0)
        time, x_t = self.objective.times(uniform), image
        if self.config.noisy:
            noise = sample_normal(seed, position, stream="noise", shape=tuple(image.shape[1:]), device=image.device)
            x_t = self.objective.add_noise(image, noise, time)
        with self.learner.autocast():
            logits = self.objective.apply(network, x_t.contiguous(memory_format=torch.channels_last), time)
        return logits.float()

    @torch.no_grad()
    def evaluate(self, held_out: Arrays) -> dict[str, float]:
        """Loss and accuracy of the averaged weights on held-out images, with noise that never changes.

        Accuracy is measured at time 0, and for noised images at all LEVELS.
        """
        batch = with_positions(to_batch(held_out, self.worker.device))
        network, levels = self.learner.snapshot(), LEVELS if self.config.noisy else LEVELS[:1]
        totals = torch.zeros(1 + len(levels))
        for part in held_out_parts(batch, self.learner, max_batch=self.max_batch):
            loss = F.cross_entropy(self.logits(network, part["image"], part), part["label"])
            right = [accuracy(self.logits(network, part["image"], part, level=p / 100), part) for p in levels]
            totals += torch.stack([loss, *right]).cpu() * len(part["position"])
        loss, *right = (totals / len(batch["position"])).tolist()
        noisy = {f"held_out_accuracy_{percent}": value for percent, value in zip(levels[1:], right[1:], strict=True)}
        return {"held_out_loss": loss, "held_out_accuracy": right[0], **noisy}


def accuracy(logits: Tensor, part: Batch) -> Tensor:
    """Share of images with the largest logit at their class, ()."""
    return (logits.argmax(dim=1) == part["label"]).float().mean()
