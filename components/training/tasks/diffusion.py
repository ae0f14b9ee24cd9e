"""Training of diffusion models (Ho et al., 2020, 2022; Hang et al., 2023).

They are bases, upsamplers, or models from image to image: a single network for several degradations, Palette (Saharia
et al., 2022). DALL-E 2's diffusion prior (Ramesh et al., 2022, section 2.2) predicts image embeddings.

Shapes: B batch, H W pixels of x_0, S resolution, E embedding_dim, L text length, T features of a text's state."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from components.configuration.diffusion import DiffusionTraining, DiscreteProcess
from components.configuration.sampling import NOISE_LEVEL
from components.configuration.trainings import DiffusionPriorTraining
from components.models.devices import to_device
from components.models.diffusion.corruption import (
    NUMBERS,
    Degraded,
    add_noise_in_mask,
    augment_low_res,
    degrade,
    denoise_in_mask,
    downsample,
    loss_in_mask,
    quantize_8_bit,
    upsample,
)
from components.models.diffusion.discrete import LossHistory, draw_timesteps, empty_history, record
from components.models.diffusion.guidance import guide
from components.models.diffusion.objective import Network
from components.models.diffusion.samplers import Denoise, sample
from components.models.diffusion.schedule import Schedule, make_schedule
from components.training.frozen import Latents
from components.training.learner import LearnerTask
from components.training.loop import Batch, Metrics
from components.training.parallel import gather
from components.training.randomness import Draws, cropped, draw_windows, null_conditions

PREVIEW_STEPS, PREVIEW_SCALE = 20, 2.0


class DiffusionTask(LearnerTask):
    """Trains a network to undo noise; frozen networks add conditions, or put latents in place of images."""

    config: DiffusionTraining

    def make_learners(self) -> None:
        process, low_res = self.config.process, self.config.low_res
        self.augmentation: Schedule | None = None
        if low_res is not None:  # once: tables then stay on the device
            name, steps = low_res.augmentation_schedule, low_res.augmentation_steps
            self.augmentation = make_schedule(name, num_train_timesteps=steps)
        self.history: LossHistory | None = None
        if isinstance(process, DiscreteProcess) and process.timestep_sampling == "loss_aware":
            self.history = empty_history(process.num_train_timesteps, self.worker.device)
        self.drawn: list[Tensor] = []  # of this step's parts: timesteps and losses (2, B)
        super().make_learners()

    def train_step(self, batch: Batch, step: int) -> Metrics:
        """Take a step, and record the losses of all ranks, in the order of the stream, for equal histories."""
        metrics = super().train_step(batch, step)
        if self.history is not None:
            drawn = gather(torch.cat(self.drawn, dim=1).T, self.worker)  # (B, 2) of the global batch
            self.history = record(self.history, timesteps=drawn[:, 0].long(), losses=drawn[:, 1])
            self.drawn = []
        return metrics

    def part_losses(self, part: Batch) -> Metrics:
        """The objective's loss (Ho et al., 2020, algorithm 1); loss-aware times are reweighted."""
        batch, cond = self.crop(part)
        time, weight = self.sample_timesteps(batch["position"])
        losses = self.losses(self.learner.forward, batch, self.dropped(batch) | cond, time)
        if weight is None:
            return {"loss": losses.mean()}
        self.drawn.append(torch.stack([time.double(), losses.detach().double()]))
        return {"loss": (weight * losses).mean()}

    def sample_timesteps(self, position: Tensor) -> tuple[Tensor, Tensor | None]:
        """Times (B,) of a step, and None; for loss-aware recipes times by past losses, and weights (B,)."""
        if self.history is None:
            return self.uniform_timesteps(position), None
        return draw_timesteps(self.history, self.draw.uniform(position, "timestep"))

    def uniform_timesteps(self, position: Tensor) -> Tensor:
        """Uniform times of training (B,), from (seed, position) alone."""
        process = self.config.process
        if isinstance(process, DiscreteProcess):
            return self.draw.integers(position, "timestep", high=process.num_train_timesteps)
        return self.objective.times(self.draw.uniform(position, "timestep"))

    def losses(self, network: Network, batch: Batch, conditions: dict[str, Tensor], time: Tensor) -> Tensor:  # (B,)
        x_0 = batch["image"]
        noise = self.draw.normal(batch["position"], "noise", x_0.shape[1:])
        x_t = self.objective.add_noise(x_0, noise, time).contiguous(memory_format=torch.channels_last)
        with self.autocast():
            output = self.objective.apply(network, x_t, time, **conditions)
        return self.objective.loss(output, x_0=x_0, noise=noise, x_t=x_t, time=time)

    def crop(self, batch: Batch, noise_level: int | None = None) -> tuple[Batch, dict[str, Tensor]]:
        """The batch, and conditioning images for the network, with noise augmentation.
        Both are cut to windows where the recipe has a crop_size, before any noise is drawn."""
        data, cond = self.config.data, self.conditioning_images(batch)
        if data.crop_size is not None:
            windows = draw_windows(self.seed, batch["position"], resolution=data.resolution, size=data.crop_size)
            batch, cond = cropped(batch, windows), cropped(cond, windows)
        return batch, self.augmented(cond, batch["position"], noise_level)

    def conditioning_images(self, batch: Batch) -> dict[str, Tensor]:
        """The upsampler's low-res images, enlarged; empty for a base model."""
        if self.config.low_res is None:
            return {}
        small = quantize_8_bit(downsample(batch["image"], self.config.low_res.low_res_resolution))
        return {"low_res": upsample(small, self.config.data.resolution)}

    def augmented(self, cond: dict[str, Tensor], position: Tensor, noise_level: int | None) -> dict[str, Tensor]:
        """Noise conditioning augmentation of `low_res`, if any.
        Each sample draws its own level in training (independent of the batch); `noise_level` is that of sampling."""
        settings = self.config.low_res
        if settings is None:
            return cond
        low_res = cond["low_res"]
        if noise_level is None:
            level = self.draw.integers(position, "noise_level", high=settings.max_noise_level + 1)
        else:
            level = torch.full(position.shape, noise_level, device=low_res.device)
        noise = self.draw.normal(position, "low_res_noise", low_res.shape[1:])
        assert self.augmentation is not None
        return cond | {"low_res": augment_low_res(self.augmentation, low_res, noise, level), "noise_level": level}

    def state_dict(self) -> dict[str, Any]:
        history = {} if self.history is None else {"history": self.history._asdict()}
        return {**super().state_dict(), **history}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        if self.history is not None:
            history = {name: to_device(tensor, self.worker.device) for name, tensor in state["history"].items()}
            self.history, self.drawn = LossHistory(**history), []

    def measures(self, network: Network, part: Batch) -> Metrics:
        """Loss with all conditions, at timesteps that never change."""
        batch, cond = self.crop(part)
        losses = self.losses(network, batch, self.conditions(batch) | cond, self.uniform_timesteps(batch["position"]))
        return {"held_out_loss": losses.mean()}

    def shown(self, parts: Iterator[Batch]) -> Iterator[list[Tensor]]:
        """Samples under held-out conditions; an upsampler's between its low-res images and originals."""
        for part in parts:
            samples = self.sample(part)
            for encoder in self.encoders:
                samples = encoder.images(samples) if isinstance(encoder, Latents) else samples
            if self.config.low_res is None:
                yield [samples]
            else:
                batch, cond = self.crop(part, self.preview_noise_level)
                yield [cond["low_res"], samples, batch["image"]]

    def sample(self, batch: Batch) -> Tensor:
        """Samples (B, 3, H, W) in [-1, 1] by DDIM under the batch's conditions, from the same noise each time."""
        batch, cond = self.crop(batch, self.preview_noise_level)
        scale = PREVIEW_SCALE if self.config.low_res is None else 1.0
        return self.ddim(self.guided(batch, cond, scale), batch)

    def guided(self, batch: Batch, cond: dict[str, Tensor], scale: float) -> Denoise:
        """The averaged network under the batch's conditions, at a guidance scale."""
        conditioning, condition, null = self.config.conditioning, self.conditions(batch) | cond, {}
        if conditioning.cond_drop_prob > 0:  # else there is no null to guide from
            null = null_conditions(batch, conditioning.conditions, num_classes=self.dataset_info.num_classes)
        return guide(self.objective, self.learner.snapshot(), condition, null, scale)

    def ddim(self, network: Denoise, batch: Batch) -> Tensor:
        """Samples (B, 3, H, W) of a guided network by DDIM. Latents have no range to be clipped to."""
        latents = any(isinstance(encoder, Latents) for encoder in self.encoders)
        process = self.config.process
        most = process.num_train_timesteps if isinstance(process, DiscreteProcess) else PREVIEW_STEPS
        return sample(
            network,
            self.objective,
            self.draw.normal(batch["position"], "preview", batch["image"].shape[1:]),
            sampler="ddim",
            num_inference_steps=min(PREVIEW_STEPS, most),
            threshold="none" if latents else "static",
            noise=lambda step: torch.empty(0),  # DDIM with eta 0 uses none
        )

    @property
    def preview_noise_level(self) -> int:
        """Noise level of an upsampler's low-res images in previews."""
        return 0 if self.config.low_res is None else min(NOISE_LEVEL, self.config.low_res.max_noise_level)


class ImageToImageTask(DiffusionTask):
    """A diffusion task conditioned on a degraded image, with a loss inside the mask alone.
    Batches hold `task` (B,), places in the configuration's tasks, and `condition_image`, the images after JPEG where
    JPEG is the task: see `components.data.images.degrade`. All else is made here, by (seed, position)."""

    def degraded(self, batch: Batch) -> Degraded:
        """The degraded images of a batch, with masks."""
        degradation, image, position = self.config.degradation, batch["image"], batch["position"]
        assert degradation is not None  # or `diffusion_task` makes another task
        return degrade(
            image,
            batch["condition_image"],
            tasks=[degradation.tasks[place] for place in batch["task"].tolist()],
            numbers=Draws(self.seed).uniforms(position, "degradation", [NUMBERS]),
            noise=self.draw.normal(position, "mask_noise", image.shape[1:]),
            mask_area=degradation.mask_area,
            factors=degradation.super_resolution_factors,
        )

    def conditioning_images(self, batch: Batch) -> dict[str, Tensor]:
        """`condition_image` (B, 4, S, S), never dropped: the model works on nothing else."""
        return {"condition_image": self.degraded(batch).condition}

    def losses(self, network: Network, batch: Batch, conditions: dict[str, Tensor], time: Tensor) -> Tensor:  # (B,)
        """Losses of `DiffusionTask` (B,) over the mask, where alone x_t is noisy."""
        x_0, mask = batch["image"], conditions["condition_image"][:, 3:]
        noise = self.draw.normal(batch["position"], "noise", x_0.shape[1:])
        x_t = add_noise_in_mask(self.objective, x_0, noise, time, mask).contiguous(memory_format=torch.channels_last)
        with self.autocast():
            output = self.objective.apply(network, x_t, time, **conditions)
        return loss_in_mask(self.objective, output, x_0=x_0, noise=noise, x_t=x_t, time=time, mask=mask)

    def shown(self, parts: Iterator[Batch]) -> Iterator[list[Tensor]]:
        """Degraded images, restored images, originals."""
        for part in parts:
            yield [self.degraded(part).image, self.sample(part), part["image"]]

    def sample(self, batch: Batch) -> Tensor:
        """Restored images of the batch, (B, 3, S, S), from equal noise at each preview."""
        image, cond = batch["image"], self.conditioning_images(batch)
        mask = cond["condition_image"][:, 3:]
        network = self.guided(batch, cond, PREVIEW_SCALE if self.config.conditioning.conditions else 1.0)
        restored = self.ddim(denoise_in_mask(network, image, mask), batch)
        return torch.where(mask > 0, restored, image)


def diffusion_task(config: DiffusionTraining, **placed: Any) -> DiffusionTask:
    """The task of a diffusion model: an `ImageToImageTask` for a recipe with degradations."""
    return (DiffusionTask if config.degradation is None else ImageToImageTask)(config, **placed)


class DiffusionPriorTask(LearnerTask):
    """Trains a transformer to predict the image embedding under a text.
    Frozen networks add the columns image_embedding, text_states and text_embedding, and the null of the last two."""

    config: DiffusionPriorTraining

    def part_losses(self, part: Batch) -> Metrics:
        return {"loss": self.losses(self.learner.forward, part, self.dropped(part)).mean()}

    def losses(self, network: nn.Module, batch: Batch, conditions: dict[str, Tensor]) -> Tensor:
        """Mean squared error of each embedding, (B,), at times and with noise (B, E) of its position."""
        position, x_0 = batch["position"], batch["image_embedding"]
        time = self.objective.times(self.draw.uniform(position, "timestep"))
        noise = self.draw.normal(position, "noise", x_0.shape[1:])
        x_t = self.objective.add_noise(x_0, noise, time)
        with self.autocast():
            output = self.objective.apply(network, x_t, time, **conditions)
        return self.objective.loss(output.float(), x_0=batch["image_embedding"], noise=noise, x_t=x_t, time=time)

    def measures(self, network: nn.Module, part: Batch) -> Metrics:
        """Loss, and cosines with the image's embedding: of a guess, and of the text's embedding.
        The guess is the prior's from pure noise in one step, near the mean embedding under the text."""
        conditions, position, x_0 = self.conditions(part), part["position"], part["image_embedding"]
        time = self.objective.times(torch.full(position.shape, 1 - 2**-24, device=self.worker.device))
        noise = self.draw.normal(position, "guess", x_0.shape[1:])
        output = self.objective.apply(network, noise, time, **conditions)
        guess = self.objective.predict_x_0(output, x_t=noise, time=time)
        return {
            "held_out_loss": self.losses(network, part, conditions).mean(),
            "held_out_prior_cosine": F.cosine_similarity(guess, x_0).mean(),
            "held_out_text_cosine": F.cosine_similarity(part["text_embedding"], x_0).mean(),
        }
