"""Tiny real trainings that several tests share: one of each task, and an ordered stream for them."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from components.configuration.conditions import DatasetInfo, TokenGrid
from components.configuration.diffusion import TASKS, DegradationConfig, DiffusionTraining
from components.configuration.trainings import (
    AutoencoderTraining,
    GANTraining,
    MaskedPriorTraining,
    PixelTraining,
    PriorTraining,
)
from components.training.loop import Arrays, Batch, Task
from components.training.parallel import ALONE, Worker
from components.training.step_model import task_maker

CONDITION = TokenGrid(codebook_size=6, height=1, width=2)
DATASET_INFO = DatasetInfo(num_classes=3, vocab_size=20, text_length=6, condition=CONDITION)
GRID = TokenGrid(codebook_size=16, height=2, width=2)
SHARED = {"total_steps": 20, "global_batch_size": 8, "seed": 5, "learning_rate": 2e-3, "warmup_steps": 4}
SHARED |= {"ema_decay": 0.9, "weight_decay": 0.01, "log_every": 5, "checkpoint_every": 10, "sample_every": 10}
TRANSFORMER = {"model_dim": 16, "num_layers": 2, "num_heads": 2, "dropout": 0.1, "conditions": ("label", "text")}
KINDS = (
    *("tokenizer", "prior", "masked_prior", "pixelcnn", "row_lstm"),
    *("base", "upsampler", "cropped_upsampler", "dit", "hybrid", "image_to_image"),
)
DIFFUSIONS: dict[str, dict[str, Any]] = {  # two training steps are soon drawn often enough for their losses to count
    "upsampler": {"low_res_resolution": 4},
    "cropped_upsampler": {"low_res_resolution": 4, "crop_size": 4, "attention_resolutions": ()},
    "hybrid": {
        "num_train_timesteps": 2,
        "variance": "learned_range",
        "loss": "hybrid",
        "timestep_sampling": "loss_aware",
    },
    "vlb": {"loss": "vlb", "min_snr_gamma": None},
    "zero_terminal_snr": {"zero_terminal_snr": True, "min_snr_gamma": None},
    "edm": {"process": "edm"},
    "flow": {"process": {"kind": "flow", "time_density": "logit_normal"}},
}


def autoencoder_config(**changes: Any) -> AutoencoderTraining:
    numbers = {"resolution": 16, "channels": 8, "channel_mult": (1, 1, 2, 2), "num_res_blocks": 1}
    numbers |= {"latent_channels": 8, "bottleneck": {"kind": "vq_ema", "codebook_size": 16, "codebook_dim": 4}}
    numbers |= {"perceptual_network": "none", "discriminator_channels": 8, "discriminator_layers": 1}
    numbers |= {"discriminator_start": 3}
    return AutoencoderTraining.of(**(SHARED | numbers | changes))


def prior_config(**changes: Any) -> PriorTraining:
    return PriorTraining.of(**(SHARED | TRANSFORMER | changes))


def pixel_config(**changes: Any) -> PixelTraining:
    numbers = {"network": "pixelcnn", "channels": 12, "num_layers": 1, "kernel_size": 3, "resolution": 4}
    numbers |= {"dropout": 0.1, "learning_rate": 1e-2}
    return PixelTraining.of(**(SHARED | numbers | changes))


def masked_prior_config(**changes: Any) -> MaskedPriorTraining:
    return MaskedPriorTraining.of(**(SHARED | TRANSFORMER | changes))


def diffusion_config(**changes: Any) -> DiffusionTraining:
    network = {"model_channels": 8, "channel_mult": (1, 2), "attention_resolutions": (4,), "head_dim": 8}
    numbers = {"resolution": 8, "network": network, "conditions": ("label", "text"), "cond_drop_prob": 0.3}
    numbers |= {"text_dim": 8, "text_layers": 1, "text_heads": 2, "process": "discrete"}
    numbers |= {} if "process" in changes else {"num_train_timesteps": 50}
    numbers |= {"max_noise_level": 20} if "low_res_resolution" in changes else {}
    return DiffusionTraining.of(**(SHARED | numbers | changes))


def dit_config(**changes: Any) -> DiffusionTraining:
    network = {"kind": "dit", "model_dim": 16, "num_layers": 2, "num_heads": 2, "patch_size": 2}
    return diffusion_config(**({"network": network} | changes))


def image_to_image_config(**changes: Any) -> DiffusionTraining:
    numbers = {"conditions": ("label",), "degradation": DegradationConfig(), "mask_area": (0.2, 0.5)}
    return diffusion_config(**(numbers | changes))


def gan_config(**changes: Any) -> GANTraining:
    numbers = {"resolution": 8, "channels": 8, "channel_mult": (1, 2), "noise_dim": 6, "discriminator_channels": 8}
    numbers |= {"discriminator_channel_mult": (1, 2), "attention_resolutions": (4,)}
    numbers |= {"discriminator_learning_rate": 4e-3, "discriminator_steps": 2, "augment": True}
    return GANTraining.of(**(SHARED | numbers | changes))


CONFIGS: dict[str, Callable[..., Any]] = {"gan": gan_config, "dit": dit_config, "tokenizer": autoencoder_config}
CONFIGS |= {"prior": prior_config, "masked_prior": masked_prior_config, "image_to_image": image_to_image_config}


def config_of(kind: str, **changes: Any) -> Any:
    if kind in ("pixelcnn", "row_lstm"):
        return pixel_config(network=kind, **changes)
    if kind not in CONFIGS:
        return diffusion_config(**DIFFUSIONS.get(kind, {}) | changes)
    return CONFIGS[kind](**changes)


def make_task(
    config: Any,
    *,
    worker: Worker = ALONE,
    max_batch_per_device: int | None = None,
    load_start: Callable[[Any], None] | None = None,
    **options: Any,
) -> Any:
    """The real task of a configuration."""
    grid = GRID if config.needs().resolution is None else None
    options = {"dataset_info": DATASET_INFO, "grid": grid, **options}
    task: Any = task_maker(config, **options)(worker=worker, load_start=load_start)
    task.max_batch = max_batch_per_device
    return task


def rows_at(config: Any, positions: range) -> Arrays:
    """What stands at these positions of the stream; a function of the position alone."""
    resolution = getattr(getattr(config, "data", None), "resolution", None) or 8
    rows = []
    for position in positions:
        numbers = np.random.default_rng(position)
        rows.append(
            {
                "image": numbers.integers(0, 256, (resolution, resolution, 3), dtype=np.uint8),
                "label": numbers.integers(0, DATASET_INFO.num_classes),
                "text": np.array([1, *numbers.integers(4, DATASET_INFO.vocab_size, 3), 2, 0]),
                "tokens": numbers.integers(0, GRID.codebook_size, GRID.height * GRID.width),
                "condition": numbers.integers(0, CONDITION.codebook_size, CONDITION.height * CONDITION.width),
                "condition_image": numbers.integers(0, 256, (resolution, resolution, 3), dtype=np.uint8),
                "task": numbers.integers(0, len(TASKS)),
                "position": position,
            }
        )
    return {name: np.stack([np.asarray(row[name]) for row in rows]) for name in rows[0]}


def batches(
    config: Any, to_batch: Callable[[Arrays], Batch], *, start_step: int = 0, worker: Worker = ALONE
) -> Iterator[Batch]:
    """This rank's batches from `start_step` on, for ever, of the positions that `worker.job_rows` gives it."""
    size, step = config.optimization.global_batch_size, start_step
    while True:
        yield to_batch(rows_at(config, range(step * size + worker.rank, (step + 1) * size, worker.world_size)))
        step += 1


def weights_of(task: Task) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in task.state_dict()["weights"].items()}


def assert_equal_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    unequal = [name for name in a if not torch.equal(a[name], b[name])]
    assert not unequal, f"{len(unequal)} of {len(a)} tensors differ: {unequal[:3]}"


def assert_close(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """Equal but for the order of additions."""
    for name, tensor in b.items():
        # While both hinges are active the gradient of the last bias is exactly zero: Adam then amplifies rounding.
        if not name.endswith("layers.5.bias"):
            torch.testing.assert_close(a[name], tensor, rtol=2e-3, atol=2e-4, msg=lambda text, n=name: f"{n}: {text}")
