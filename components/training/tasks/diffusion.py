"""Training of one diffusion model, base or upsampler (Ho et al., 2020; Ho et al., 2022; Hang et al., 2023).

Shapes: B batch, H W pixels of x_0.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from components.diffusion.corruption import augment_low_res, downsample, quantize_8_bit, upsample
from components.diffusion.guidance import guide
from components.diffusion.objective import Network, make_objective
from components.diffusion.samplers import sample
from components.diffusion.schedule import make_schedule
from components.diffusion.timestep_sampling import LossHistory, draw_timesteps, empty_history, record
from components.storage.bundle import NETWORKS
from components.training.batches import to_batch, with_positions
from components.training.conditioning import conditions_of, dropped_conditions, null_conditions
from components.training.config import DatasetInfo, DiffusionConfig
from components.training.cropping import cropped, draw_windows
from components.training.diffusion_settings import (
    low_res_schedule_settings,
    network_arguments,
    network_kind,
    objective_settings,
)
from components.training.frozen import Latents, LoadEncoder, encoded
from components.training.learner import Learner, accumulated, held_out_parts, seeded
from components.training.loop import Arrays, Batch, Metrics
from components.training.parallel import ALONE, Worker, gather
from components.training.previews import png_grid
from components.training.randomness import sample_integers, sample_normal, sample_uniform

PREVIEW_SAMPLES, PREVIEW_STEPS, PREVIEW_SCALE = 8, 20, 2.0


class DiffusionTask:
    """One network that learns to undo noise.

    `load_encoders` add the conditions that come from networks trained before, or put latents in the place of images.
    """

    max_batch: int | None = None

    def __init__(
        self,
        config: DiffusionConfig,
        *,
        dataset_info: DatasetInfo,
        load_encoders: Sequence[LoadEncoder] = (),
        worker: Worker = ALONE,
    ) -> None:
        self.config, self.dataset_info, self.worker = config, dataset_info, worker
        self.parts_matter = config.dropout > 0
        self.encoders = [load(worker.device) for load in load_encoders]
        self.objective = make_objective(objective_settings(config))
        self.low_res_schedule = make_schedule(**low_res_schedule_settings(config))
        self.history = empty_history(config.num_train_timesteps) if config.timestep_sampling == "loss_aware" else None
        self.drawn: list[Tensor] = []  # of this step's parts: timesteps and losses (2, B)
        with seeded(config.seed):
            network = NETWORKS[network_kind(config)](**network_arguments(config, dataset_info))
        self.learner = Learner(
            network,
            config=config,
            worker=worker,
            ema_decay=config.ema_decay,
            compile_network=config.compile_network,
        )

    def train_step(self, batch: Batch, step: int) -> Metrics:
        total = torch.zeros((), device=self.worker.device)
        for part, share in accumulated(batch, self.learner, max_batch=self.max_batch, step=step):
            loss = self.loss(encoded(part, self.encoders)) * share
            self.learner.backward(loss)
            total += loss.detach()
        taken, norm = self.learner.update(step)
        if taken:
            self.learner.average()
        self.record_losses()
        return {"loss": total, "grad_norm": norm}

    def loss(self, batch: Batch) -> Tensor:
        """The objective's loss (Ho et al., 2020, algorithm 1), a scalar; loss-aware steps are weighed back."""
        batch, given = self.crop(batch)
        conditions = dropped_conditions(batch, self.config, self.dataset_info) | given
        time, weight = self.sample_timesteps(batch["position"])
        losses = self.losses(self.learner.forward, batch, conditions, time)
        if weight is None:
            return losses.mean()
        self.drawn.append(torch.stack([time.double(), losses.detach().double()]))
        return (weight * losses).mean()

    def sample_timesteps(self, position: Tensor) -> tuple[Tensor, Tensor | None]:
        """Times (B,) of this step; where the recipe says so by the losses they had, and then with weights (B,)."""
        if self.history is None:
            return self.uniform_timesteps(position), None
        return draw_timesteps(self.history, sample_uniform(self.config.seed, position, stream="timestep"))

    def record_losses(self) -> None:
        """Record the losses of all ranks, in the order of the stream, so that every rank draws from one history."""
        if self.history is not None:
            drawn = gather(torch.cat(self.drawn, dim=1).T, self.worker)  # (B, 2) of the global batch
            self.history = record(self.history, timesteps=drawn[:, 0].long(), losses=drawn[:, 1])
            self.drawn = []

    def uniform_timesteps(self, position: Tensor) -> Tensor:
        """Even times of training (B,), from (seed, position) alone."""
        config = self.config
        if config.objective == "discrete":
            return sample_integers(config.seed, position, stream="timestep", high=config.num_train_timesteps)
        return self.objective.times(sample_uniform(config.seed, position, stream="timestep"))

    def losses(self, network: Network, batch: Batch, conditions: dict[str, Tensor], time: Tensor) -> Tensor:  # (B,)
        x_0 = batch["image"]
        noise = sample_normal(self.config.seed, batch["position"], stream="noise", shape=tuple(x_0.shape[1:]))
        x_t = self.objective.add_noise(x_0, noise, time).contiguous(memory_format=torch.channels_last)
        with self.learner.autocast():
            output = self.objective.apply(network, x_t, time, **conditions)
        return self.objective.loss(output, x_0=x_0, noise=noise, x_t=x_t, time=time)

    def crop(self, batch: Batch, noise_level: int | None = None) -> tuple[Batch, dict[str, Tensor]]:
        """The batch and the images that the network is given with it: windows of both where it learns from windows,
        cut before any noise is drawn."""
        config, given = self.config, self.conditioning_images(batch)
        if config.crop_size is not None:
            windows = draw_windows(config.seed, batch["position"], resolution=config.resolution, size=config.crop_size)
            batch, given = cropped(batch, windows), cropped(given, windows)
        return batch, self.augmented(given, batch["position"], noise_level)

    def conditioning_images(self, batch: Batch) -> dict[str, Tensor]:
        """The upsampler's low-res images, enlarged; nothing for a base model."""
        if self.config.low_res_resolution is None:
            return {}
        small = quantize_8_bit(downsample(batch["image"], self.config.low_res_resolution))
        return {"low_res": upsample(small, self.config.resolution)}

    def augmented(self, given: dict[str, Tensor], position: Tensor, noise_level: int | None) -> dict[str, Tensor]:
        """Noise conditioning augmentation of `low_res`, where there is one.

        Each sample draws its own level in training (the level of one sample never depends on its batch); at sampling
        it is given.
        """
        if "low_res" not in given:
            return given
        config, low_res = self.config, given["low_res"]
        if noise_level is None:
            level = sample_integers(config.seed, position, stream="noise_level", high=config.max_noise_level + 1)
        else:
            level = torch.full_like(position, noise_level)
        noise = sample_normal(config.seed, position, stream="low_res_noise", shape=tuple(low_res.shape[1:]))
        return given | {"low_res": augment_low_res(self.low_res_schedule, low_res, noise, level), "noise_level": level}

    def state_dict(self) -> dict[str, Any]:
        history = {} if self.history is None else {"history": self.history._asdict()}
        return {"weights": self.learner.weights(), "learner": self.learner.progress(), **history}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.learner.restore(state["weights"], state["learner"])
        if self.history is not None:
            self.history, self.drawn = LossHistory(**state["history"]), []

    @torch.no_grad()
    def evaluate(self, held_out: Arrays) -> dict[str, float]:
        """Loss of the averaged weights on held-out images with all conditions, at timesteps that never change."""
        batch = with_positions(to_batch(held_out, self.worker.device))
        network, total = self.learner.snapshot(), 0.0
        for plain in held_out_parts(batch, self.learner, max_batch=self.max_batch):
            part, given = self.crop(encoded(plain, self.encoders))
            conditions = conditions_of(part, self.config.conditions) | given
            total += float(self.losses(network, part, conditions, self.uniform_timesteps(part["position"])).sum())
        return {"held_out_loss": total / len(batch["position"])}

    @torch.no_grad()
    def preview(self, held_out: Arrays, step: int) -> dict[str, bytes]:
        """Samples under the conditions of held-out images; an upsampler's below what it was given."""
        first = {name: column[:PREVIEW_SAMPLES] for name, column in held_out.items()}
        batch = with_positions(to_batch(first, self.worker.device))
        parts = held_out_parts(batch, self.learner, max_batch=self.max_batch)
        rows = [torch.cat(row) for row in zip(*(self.shown(encoded(p, self.encoders)) for p in parts), strict=True)]
        return {"samples": png_grid(torch.cat(rows), columns=len(rows[0]))}

    def shown(self, batch: Batch) -> list[Tensor]:
        """The rows of a preview, each (B, 3, H, W)."""
        samples = self.sample(batch)
        for encoder in self.encoders:
            samples = encoder.images(samples) if isinstance(encoder, Latents) else samples
        if self.config.low_res_resolution is None:
            return [samples]
        batch, given = self.crop(batch, self.config.noise_level)
        return [given["low_res"], samples, batch["image"]]

    def sample(self, batch: Batch) -> Tensor:
        """(B, 3, H, W) in [-1, 1] by DDIM under the batch's conditions, from noise that is the same at each preview."""
        config, names = self.config, self.config.conditions
        batch, given = self.crop(batch, config.noise_level)
        condition = conditions_of(batch, names) | given
        # What was never dropped has no null to guide away from; the table of labels then lacks its row.
        null = (
            null_conditions(batch, names, num_classes=self.dataset_info.num_classes)
            if config.cond_drop_prob > 0
            else {}
        )
        scale = PREVIEW_SCALE if config.low_res_resolution is None else 1.0
        return sample(
            guide(self.objective, self.learner.snapshot(), condition, null, scale),
            self.objective,
            sample_normal(config.seed, batch["position"], stream="preview", shape=tuple(batch["image"].shape[1:])),
            sampler="ddim",
            num_inference_steps=min(PREVIEW_STEPS, config.num_inference_steps),
            threshold=config.threshold,
            percentile=config.threshold_percentile,
            noise=lambda step: torch.empty(0),  # DDIM with eta 0 asks for none
        )
