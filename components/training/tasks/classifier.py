"""Training of a classifier on noised images (Dhariwal and Nichol, 2021, section 4 and appendix H), or on clean ones.

Shapes: B batch, K classes, H W pixels.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from components.diffusion.objective import make_objective
from components.models.noisy_classifier import NoisyClassifier
from components.training.augmentation import mirrored, shifted
from components.training.batches import to_batch, with_positions
from components.training.classifier_config import ClassifierConfig
from components.training.config import DatasetInfo
from components.training.diffusion_settings import process_settings
from components.training.learner import Learner, accumulated, held_out_parts, seeded
from components.training.loop import Arrays, Batch, Metrics
from components.training.parallel import ALONE, Worker
from components.training.randomness import sample_normal, sample_uniform

LEVELS = (0, 25, 50, 75)  # percent of the way from the image to noise, where accuracy is measured


def classifier_arguments(config: ClassifierConfig, dataset_info: DatasetInfo) -> dict[str, Any]:
    """Arguments of the network for this recipe and data set; plain values, they go into the bundle."""
    return {
        "resolution": config.resolution,
        "num_classes": dataset_info.num_classes,
        "model_channels": config.model_channels,
        "channel_mult": list(config.channel_mult),
        "num_res_blocks": config.num_res_blocks,
        "attention_resolutions": list(config.attention_resolutions),
        "head_dim": config.head_dim,
        "dropout": config.dropout,
        "norm_groups": config.norm_groups,
    }


def classifier_objective(config: ClassifierConfig) -> dict[str, Any]:
    """The process that its images come from, as plain values. What a network would predict does not matter here."""
    unused = {"prediction_type": "v_prediction"} if config.objective == "discrete" else {}
    return process_settings(config) | unused


class ClassifierTask:
    """One network that learns the class of the image behind x_t."""

    max_batch: int | None = None

    def __init__(
        self,
        config: ClassifierConfig,
        *,
        dataset_info: DatasetInfo,
        worker: Worker = ALONE,
    ) -> None:
        self.config, self.worker, self.parts_matter = config, worker, config.dropout > 0
        self.objective = make_objective(classifier_objective(config))
        with seeded(config.seed):
            network = NoisyClassifier(**classifier_arguments(config, dataset_info))
        self.learner = Learner(network, config=config, worker=worker, ema_decay=config.ema_decay)

    def train_step(self, batch: Batch, step: int) -> Metrics:
        totals = torch.zeros(2, device=self.worker.device)
        for part, share in accumulated(batch, self.learner, max_batch=self.max_batch, step=step):
            logits = self.logits(self.learner.forward, self.augmented(part), part)
            loss = F.cross_entropy(logits, part["label"]) * share
            self.learner.backward(loss)
            totals += torch.stack([loss.detach(), accuracy(logits, part) * share])
        taken, norm = self.learner.update(step)
        if taken:
            self.learner.average()
        return {"loss": totals[0], "accuracy": totals[1], "grad_norm": norm}

    def augmented(self, part: Batch) -> Tensor:
        seed, position = self.config.seed, part["position"]
        image = shifted(part["image"], position, seed=seed, max_shift=self.config.max_shift)
        return mirrored(image, position, seed=seed) if self.config.mirror else image

    def logits(self, network: nn.Module, image: Tensor, part: Batch, *, level: float | None = None) -> Tensor:
        """Logits (B, K) fp32 of images noised to a random time each, or to the level (0 to 1) that is given."""
        seed, position = self.config.seed, part["position"]
        uniform = sample_uniform(seed, position, stream="timestep")
        if level is not None or not self.config.noisy:
            uniform = torch.full_like(uniform, level or 0.0)
        time, x_t = self.objective.times(uniform), image
        if self.config.noisy:
            noise = sample_normal(seed, position, stream="noise", shape=tuple(image.shape[1:]))
            x_t = self.objective.add_noise(image, noise, time)
        with self.learner.autocast():
            logits = self.objective.apply(network, x_t.contiguous(memory_format=torch.channels_last), time)
        return logits.float()

    def state_dict(self) -> dict[str, Any]:
        return {"weights": self.learner.weights(), "learner": self.learner.progress()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.learner.restore(state["weights"], state["learner"])

    @torch.no_grad()
    def evaluate(self, held_out: Arrays) -> dict[str, float]:
        """Loss and accuracy of the averaged weights on held-out images: accuracy at the first time, and at several
        ones where the images are noisy; noise that never changes."""
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

    def preview(self, held_out: Arrays, step: int) -> dict[str, bytes]:
        """It makes no images."""
        del held_out, step
        return {}


def accuracy(logits: Tensor, part: Batch) -> Tensor:
    """Share of images whose class has the largest logit, ()."""
    return (logits.argmax(dim=1) == part["label"]).float().mean()
