"""Training of diffusion models, base or upsampler (Ho et al., 2020, 2022; Hang et al., 2023).

Shapes: B batch, H W pixels of x_0.
"""

from collections.abc import Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor

from components.configuration.conditions import DatasetInfo
from components.configuration.diffusion import DiffusionTraining
from components.configuration.processes import DiscreteProcess
from components.configuration.sampling import NOISE_LEVEL
from components.models.devices import to_device
from components.models.diffusion.corruption import augment_low_res, downsample, quantize_8_bit, upsample
from components.models.diffusion.guidance import guide
from components.models.diffusion.objective import Network, make_objective
from components.models.diffusion.samplers import Denoise, sample
from components.models.diffusion.schedule import Schedule, make_schedule
from components.models.diffusion.timestep_sampling import LossHistory, draw_timesteps, empty_history, record
from components.training.augmentation import cropped, draw_windows
from components.training.batches import png_grid, to_batch, with_positions
from components.training.building import make_network
from components.training.conditioning import conditions_of, dropped_conditions, null_conditions
from components.training.frozen import Latents, LoadEncoder, encoded
from components.training.learner import Learner, LearnerTask, accumulated, held_out_parts, initialized
from components.training.loop import Arrays, Batch, Metrics
from components.training.parallel import ALONE, Worker, gather
from components.training.randomness import sample_integers, sample_normal, sample_uniform

PREVIEW_SAMPLES, PREVIEW_STEPS, PREVIEW_SCALE = 8, 20, 2.0


class DiffusionTask(LearnerTask[Any]):
    """Trains a network to undo noise.

    `load_encoders` add the conditions from frozen networks, or put latents in the place of images.
    """

    def __init__(
        self,
        config: DiffusionTraining,
        *,
        dataset_info: DatasetInfo,
        load_encoders: Sequence[LoadEncoder] = (),
        worker: Worker = ALONE,
    ) -> None:
        self.config, self.dataset_info, self.worker = config, dataset_info, worker
        self.seed, self.parts_matter = config.optimization.seed, getattr(config.network, "dropout", 0.0) > 0
        self.encoders = [load(worker.device) for load in load_encoders]
        self.objective = make_objective(config.process.objective())
        self.augmentation: Schedule | None = None
        if config.low_res is not None:
            name, steps = config.low_res.augmentation_schedule, config.low_res.augmentation_steps
            self.augmentation = make_schedule(name, num_train_timesteps=steps)  # once: tables then stay on the device
        process = config.process
        self.history = empty_history(process.num_train_timesteps, worker.device) if is_loss_aware(process) else None
        self.drawn: list[Tensor] = []  # of this step's parts: timesteps and losses (2, B)
        with initialized(config.optimization.seed, worker):
            network = make_network(config, dataset_info)
        self.learner = Learner(network, config=config.optimization, worker=worker)

    def train_step(self, batch: Batch, step: int) -> Metrics:
        total = torch.zeros((), device=self.worker.device)
        for part, share in accumulated(batch, self.learner, max_batch=self.max_batch, step=step):
            loss = self.loss(encoded(part, self.encoders)) * share
            self.learner.backward(loss)
            total += loss.detach()
        norm = self.learner.step(step)
        self.record_losses()
        return {"loss": total, "grad_norm": norm}

    def loss(self, batch: Batch) -> Tensor:
        """The objective's loss (Ho et al., 2020, algorithm 1), a scalar; loss-aware times are reweighted."""
        batch, cond = self.crop(batch)
        conditions = dropped_conditions(batch, self.config.conditioning, self.dataset_info, seed=self.seed) | cond
        time, weight = self.sample_timesteps(batch["position"])
        losses = self.losses(self.learner.forward, batch, conditions, time)
        if weight is None:
            return losses.mean()
        self.drawn.append(torch.stack([time.double(), losses.detach().double()]))
        return (weight * losses).mean()

    def sample_timesteps(self, position: Tensor) -> tuple[Tensor, Tensor | None]:
        """Times (B,) of a step, and None; for loss-aware recipes times by past losses, and weights (B,)."""
        if self.history is None:
            return self.uniform_timesteps(position), None
        return draw_timesteps(self.history, self.uniform(position))

    def record_losses(self) -> None:
        """Record the losses of all ranks, in the order of the stream, for equal histories on all ranks."""
        if self.history is not None:
            drawn = gather(torch.cat(self.drawn, dim=1).T, self.worker)  # (B, 2) of the global batch
            self.history = record(self.history, timesteps=drawn[:, 0].long(), losses=drawn[:, 1])
            self.drawn = []

    def uniform_timesteps(self, position: Tensor) -> Tensor:
        """Uniform times of training (B,), from (seed, position) alone."""
        process = self.config.process
        if isinstance(process, DiscreteProcess):
            return self.integers(position, stream="timestep", high=process.num_train_timesteps)
        return self.objective.times(self.uniform(position))

    def uniform(self, position: Tensor) -> Tensor:
        return sample_uniform(self.seed, position, stream="timestep", device=self.worker.device)

    def integers(self, position: Tensor, *, stream: str, high: int) -> Tensor:
        return sample_integers(self.seed, position, stream=stream, high=high, device=self.worker.device)

    def normal(self, position: Tensor, *, stream: str, like: Tensor) -> Tensor:
        """Noise of the positions, with shape and device of the images `like` (B, ...)."""
        return sample_normal(self.seed, position, stream=stream, shape=tuple(like.shape[1:]), device=like.device)

    def losses(self, network: Network, batch: Batch, conditions: dict[str, Tensor], time: Tensor) -> Tensor:  # (B,)
        x_0 = batch["image"]
        noise = self.normal(batch["position"], stream="noise", like=x_0)
        x_t = self.objective.add_noise(x_0, noise, time).contiguous(memory_format=torch.channels_last)
        with self.learner.autocast():
            output = self.objective.apply(network, x_t, time, **conditions)
        return self.objective.loss(output, x_0=x_0, noise=noise, x_t=x_t, time=time)

    def crop(self, batch: Batch, noise_level: int | None = None) -> tuple[Batch, dict[str, Tensor]]:
        """The batch, and conditioning images for the network, with noise augmentation.

        Both are cut to windows where the recipe has a crop_size, before any noise is drawn.
        """
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

        Each sample draws its own level in training (independent of the batch); `noise_level` is the level at sampling.
        """
        settings = self.config.low_res
        if settings is None:
            return cond
        low_res = cond["low_res"]
        if noise_level is None:
            level = self.integers(position, stream="noise_level", high=settings.max_noise_level + 1)
        else:
            level = torch.full(position.shape, noise_level, device=low_res.device)
        noise = self.normal(position, stream="low_res_noise", like=low_res)
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

    @torch.no_grad()
    def evaluate(self, held_out: Arrays) -> dict[str, float]:
        """Loss of the averaged weights on held-out images with all conditions, at timesteps that never change."""
        batch = with_positions(to_batch(held_out, self.worker.device))
        network, total = self.learner.snapshot(), 0.0
        for plain in held_out_parts(batch, self.learner, max_batch=self.max_batch):
            part, cond = self.crop(encoded(plain, self.encoders))
            conditions = conditions_of(part, self.config.conditioning.conditions) | cond
            total += float(self.losses(network, part, conditions, self.uniform_timesteps(part["position"])).sum())
        return {"held_out_loss": total / len(batch["position"])}

    @torch.no_grad()
    def preview(self, held_out: Arrays, step: int) -> dict[str, bytes]:
        """Samples under the conditions of held-out images; an upsampler's below its low-res images."""
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
        if self.config.low_res is None:
            return [samples]
        batch, cond = self.crop(batch, self.preview_noise_level)
        return [cond["low_res"], samples, batch["image"]]

    def sample(self, batch: Batch) -> Tensor:
        """Samples (B, 3, H, W) in [-1, 1] by DDIM under the batch's conditions.

        Noise is the same at each preview.
        """
        batch, cond = self.crop(batch, self.preview_noise_level)
        scale = PREVIEW_SCALE if self.config.low_res is None else 1.0
        return self.ddim(self.guided(batch, cond, scale), batch)

    def guided(self, batch: Batch, cond: dict[str, Tensor], scale: float) -> Denoise:
        """The averaged network under the batch's conditions, at a guidance scale."""
        conditioning = self.config.conditioning
        condition, null = conditions_of(batch, conditioning.conditions) | cond, {}
        if conditioning.cond_drop_prob > 0:  # conditions that were never dropped have no null to guide away from
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
            self.normal(batch["position"], stream="preview", like=batch["image"]),
            sampler="ddim",
            num_inference_steps=min(PREVIEW_STEPS, most),
            threshold="none" if latents else "static",
            noise=lambda step: torch.empty(0),  # DDIM with eta 0 uses none
        )

    @property
    def preview_noise_level(self) -> int:
        """Noise level of an upsampler's low-res images in previews."""
        return 0 if self.config.low_res is None else min(NOISE_LEVEL, self.config.low_res.max_noise_level)


def is_loss_aware(process: object) -> TypeGuard[DiscreteProcess]:
    """True if times of training are drawn by their past losses."""
    return isinstance(process, DiscreteProcess) and process.timestep_sampling == "loss_aware"
