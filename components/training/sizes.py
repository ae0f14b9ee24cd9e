"""How many bytes a training writes, told from its configuration alone: its networks are built without memory."""

from typing import Any, NamedTuple

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from components.models.autoencoder import Autoencoder
from components.models.discriminator import PatchDiscriminator
from components.models.gan import ProjectionDiscriminator
from components.storage.bundle import NETWORKS
from components.training.classifier_config import ClassifierConfig
from components.training.config import (
    AutoencoderConfig,
    DatasetInfo,
    DiffusionConfig,
    GANConfig,
    MaskedPriorConfig,
    PixelConfig,
    PriorConfig,
    TokenGrid,
    TrainingConfig,
)
from components.training.contrastive_config import ContrastiveConfig, DiffusionPriorConfig
from components.training.diffusion_settings import network_arguments, network_kind
from components.training.loop import is_scheduled
from components.training.tasks.autoencoder import autoencoder_arguments
from components.training.tasks.classifier import classifier_arguments
from components.training.tasks.contrastive import contrastive_arguments
from components.training.tasks.diffusion_prior import diffusion_prior_arguments
from components.training.tasks.gan import discriminator_arguments, generator_arguments
from components.training.tasks.pixels import pixel_arguments
from components.training.tasks.prior import transformer_arguments

MOMENTS = 2  # numbers that AdamW keeps for each that it trains, in fp32


class _Undrawn(TorchFunctionMode):
    """Initial weights are neither drawn nor normalized: they have no memory, and torch would first import sympy, which
    takes a second."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        if func.__name__ in ("normal_", "normalize"):
            return [*args, *named.values()][0]
        return (torch.empty if func is torch.randn else func)(*args, **named)


class Sizes(NamedTuple):
    """Bytes."""

    checkpoint: int  # weights, averages and optimizers
    model: int  # what is left in the end, with the snapshots of a power EMA


def training_sizes(config: TrainingConfig, dataset_info: DatasetInfo, *, grid: TokenGrid | None = None) -> Sizes:
    """What one checkpoint of a training and its finished model take.

    Args:
        dataset_info: what the data set conditions on.
        grid: of the tokens that a prior learns; None for what learns images.
    """
    with torch.device("meta"), _Undrawn():
        kept, others = _networks(config, dataset_info, grid)
    averages = 0 if config.ema_decay == 0 else 2 if config.ema == "power" else 1
    trained = [p for network in (kept, *others) for p in network.parameters() if p.requires_grad]
    weights = _bytes(kept) * (1 + averages) + sum(map(_bytes, others))
    snapshots = sum(is_scheduled(step, config) for step in range(1, config.total_steps + 1)) if averages == 2 else 0
    return Sizes(weights + MOMENTS * sum(map(_tensor_bytes, trained)), _bytes(kept) * (1 + 2 * snapshots))


def autoencoder_grid(config: AutoencoderConfig) -> TokenGrid:
    """The tokens that an autoencoder will make of an image."""
    with torch.device("meta"), _Undrawn():
        network = Autoencoder(**autoencoder_arguments(config))
    return TokenGrid(codebook_size=network.codebook_size, height=network.grid[0], width=network.grid[1])


def _networks(
    config: TrainingConfig, dataset_info: DatasetInfo, grid: TokenGrid | None
) -> tuple[nn.Module, tuple[nn.Module, ...]]:
    """The network that is kept in the end, and those that are trained with it alone."""
    match config:
        case AutoencoderConfig():
            judge = PatchDiscriminator(channels=config.discriminator_channels, num_layers=config.discriminator_layers)
            return Autoencoder(**autoencoder_arguments(config)), (judge,) if config.adversarial_weight > 0 else ()
        case GANConfig():
            judge = ProjectionDiscriminator(**discriminator_arguments(config, dataset_info))
            return NETWORKS["gan"](**generator_arguments(config, dataset_info)), (judge,)
        case DiffusionConfig():
            return NETWORKS[network_kind(config)](**network_arguments(config, dataset_info)), ()
        case PixelConfig():
            return NETWORKS[config.network](**pixel_arguments(config, dataset_info, grid)), ()
        case PriorConfig() | MaskedPriorConfig() if grid is not None:
            kind = "prior" if isinstance(config, PriorConfig) else "masked_prior"
            return NETWORKS[kind](**transformer_arguments(config, dataset_info, grid)), ()
        case ContrastiveConfig():
            return NETWORKS["contrastive"](**contrastive_arguments(config, dataset_info)), ()
        case DiffusionPriorConfig():
            return NETWORKS["diffusion_prior"](**diffusion_prior_arguments(config, dataset_info)), ()
        case ClassifierConfig():
            return NETWORKS["noisy_classifier"](**classifier_arguments(config, dataset_info)), ()
        case _:
            raise TypeError(f"no training has the configuration {type(config).__name__}")


def _bytes(network: nn.Module) -> int:
    return sum(map(_tensor_bytes, network.state_dict().values()))


def _tensor_bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
