"""Training of image-to-image models: a network for several degradations (Palette).

Source: Saharia et al., 2022.

Shapes: B batch, S resolution.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from components.configuration.conditions import DatasetInfo
from components.configuration.diffusion import DiffusionTraining
from components.models.diffusion.degradation import (
    NUMBERS,
    Degraded,
    add_noise_in_mask,
    degrade,
    denoise_in_mask,
    loss_in_mask,
)
from components.models.diffusion.objective import Network
from components.training.frozen import LoadEncoder
from components.training.loop import Batch
from components.training.parallel import ALONE, Worker
from components.training.randomness import sample_uniforms
from components.training.tasks.diffusion import PREVIEW_SCALE, DiffusionTask


class ImageToImageTask(DiffusionTask):
    """A diffusion task conditioned on a degraded image, with a loss inside the mask alone.

    Batches hold `task` (B,), places in the configuration's tasks, and `condition_image`, the images after JPEG where
    JPEG is the task: see `components.data.images.degrade`. All else is made here, by (seed, position).
    """

    def __init__(self, config: DiffusionTraining, *, dataset_info: DatasetInfo, **placed: Any) -> None:
        super().__init__(config, dataset_info=dataset_info, **placed)
        assert config.degradation is not None
        self.degradation = config.degradation

    def degraded(self, batch: Batch) -> Degraded:
        """The degraded images of a batch, with masks."""
        degradation, image, position = self.degradation, batch["image"], batch["position"]
        return degrade(
            image,
            batch["condition_image"],
            tasks=[degradation.tasks[place] for place in batch["task"].tolist()],
            numbers=sample_uniforms(self.seed, position, stream="degradation", shape=(NUMBERS,)),
            noise=self.normal(position, stream="mask_noise", like=image),
            mask_area=degradation.mask_area,
            factors=degradation.super_resolution_factors,
        )

    def conditioning_images(self, batch: Batch) -> dict[str, Tensor]:
        """`condition_image` (B, 4, S, S), never dropped: the model works on nothing else."""
        return {"condition_image": self.degraded(batch).condition}

    def losses(self, network: Network, batch: Batch, conditions: dict[str, Tensor], time: Tensor) -> Tensor:  # (B,)
        """Losses of `DiffusionTask` (B,) over the mask, where alone x_t is noisy."""
        x_0, mask = batch["image"], conditions["condition_image"][:, 3:]
        noise = self.normal(batch["position"], stream="noise", like=x_0)
        x_t = add_noise_in_mask(self.objective, x_0, noise, time, mask).contiguous(memory_format=torch.channels_last)
        with self.learner.autocast():
            output = self.objective.apply(network, x_t, time, **conditions)
        return loss_in_mask(self.objective, output, x_0=x_0, noise=noise, x_t=x_t, time=time, mask=mask)

    def shown(self, batch: Batch) -> list[Tensor]:
        """The rows of a preview: degraded images, restored images, originals."""
        return [self.degraded(batch).image, self.sample(batch), batch["image"]]

    def sample(self, batch: Batch) -> Tensor:
        """Restored images of the batch, (B, 3, S, S), from equal noise at each preview."""
        image, cond = batch["image"], self.conditioning_images(batch)
        mask = cond["condition_image"][:, 3:]
        network = self.guided(batch, cond, PREVIEW_SCALE if self.config.conditioning.conditions else 1.0)
        restored = self.ddim(denoise_in_mask(network, image, mask), batch)
        return torch.where(mask > 0, restored, image)


def diffusion_task(
    config: DiffusionTraining,
    *,
    dataset_info: DatasetInfo,
    load_encoders: Sequence[LoadEncoder] = (),
    worker: Worker = ALONE,
) -> DiffusionTask:
    """The task of a diffusion model: an `ImageToImageTask` for a recipe with degradations."""
    kind = DiffusionTask if config.degradation is None else ImageToImageTask
    return kind(config, dataset_info=dataset_info, load_encoders=load_encoders, worker=worker)
