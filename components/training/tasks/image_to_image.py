"""Training of an image-to-image model: one network for several degradations (Palette; Saharia et al., 2022).

Shapes: B batch, S resolution.
"""

from typing import Any

import torch
from torch import Tensor

from components.diffusion.degradation import (
    Degraded,
    add_noise_in_mask,
    degrade,
    denoise_in_mask,
    loss_in_mask,
)
from components.diffusion.guidance import guide
from components.diffusion.masks import NUMBERS
from components.diffusion.objective import Network
from components.diffusion.samplers import sample
from components.training.conditioning import conditions_of, null_conditions
from components.training.config import DatasetInfo
from components.training.image_to_image_config import ImageToImageConfig
from components.training.loop import Batch
from components.training.randomness import sample_normal, sample_uniforms
from components.training.tasks.diffusion import PREVIEW_SCALE, PREVIEW_STEPS, DiffusionTask


class ImageToImageTask(DiffusionTask):
    """A diffusion task whose network is given a degraded image, and answers for its mask alone.

    Batches hold `task` (B,), places in the configuration's tasks, and `condition_image`, the images after JPEG where
    that is the task: see components/data/degradations.py. All else is made here, by (seed, position).
    """

    def __init__(self, config: ImageToImageConfig, *, dataset_info: DatasetInfo, **placed: Any) -> None:
        super().__init__(config, dataset_info=dataset_info, **placed)
        self.degradations = config  # the same numbers, among them those that other diffusion models lack

    def degraded(self, batch: Batch) -> Degraded:
        """What is left of each image."""
        config, image, position = self.degradations, batch["image"], batch["position"]
        return degrade(
            image,
            batch["condition_image"],
            tasks=[config.tasks[place] for place in batch["task"].tolist()],
            numbers=sample_uniforms(config.seed, position, stream="degradation", shape=(NUMBERS,)),
            noise=sample_normal(config.seed, position, stream="mask_noise", shape=tuple(image.shape[1:])),
            mask_area=config.mask_area,
            factors=config.super_resolution_factors,
        )

    def conditioning_images(self, batch: Batch) -> dict[str, Tensor]:
        """`condition_image` (B, 4, S, S), never dropped: without it there is nothing to work on."""
        return {"condition_image": self.degraded(batch).condition}

    def losses(self, network: Network, batch: Batch, conditions: dict[str, Tensor], time: Tensor) -> Tensor:  # (B,)
        """Those of `DiffusionTask` over the mask, where alone x_t is noisy."""
        x_0, mask = batch["image"], conditions["condition_image"][:, 3:]
        noise = sample_normal(self.config.seed, batch["position"], stream="noise", shape=tuple(x_0.shape[1:]))
        x_t = add_noise_in_mask(self.objective, x_0, noise, time, mask).contiguous(memory_format=torch.channels_last)
        with self.learner.autocast():
            output = self.objective.apply(network, x_t, time, **conditions)
        return loss_in_mask(self.objective, output, x_0=x_0, noise=noise, x_t=x_t, time=time, mask=mask)

    def shown(self, batch: Batch) -> list[Tensor]:
        """What was given, what was made of it, and the originals."""
        return [self.degraded(batch).image, self.sample(batch), batch["image"]]

    def sample(self, batch: Batch) -> Tensor:
        """The images of the batch restored, (B, 3, S, S), from noise that is the same at each preview."""
        config, names, known = self.config, self.config.conditions, batch["image"]
        given = self.conditioning_images(batch)
        mask = given["condition_image"][:, 3:]
        null = (
            null_conditions(batch, names, num_classes=self.dataset_info.num_classes)
            if config.cond_drop_prob > 0
            else {}
        )
        scale = PREVIEW_SCALE if names else 1.0
        network = guide(self.objective, self.learner.snapshot(), conditions_of(batch, names) | given, null, scale)
        made = sample(
            denoise_in_mask(network, known, mask),
            self.objective,
            sample_normal(config.seed, batch["position"], stream="preview", shape=tuple(known.shape[1:])),
            sampler="ddim",
            num_inference_steps=min(PREVIEW_STEPS, config.num_inference_steps),
            threshold=config.threshold,
            percentile=config.threshold_percentile,
            noise=lambda step: torch.empty(0),  # DDIM with eta 0 asks for none
        )
        return torch.where(mask > 0, made, known)
