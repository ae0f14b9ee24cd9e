"""How many bytes a training writes, told from its configuration alone: its networks are built without memory."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from components.configuration.dataset_info import DatasetInfo, TokenGrid
from components.configuration.trainings import AnyTraining, AutoencoderTraining, GANTraining
from components.models.discriminator import PatchDiscriminator
from components.models.gan import ProjectionDiscriminator
from components.training.building import discriminator_arguments, make_network
from components.training.loop import is_scheduled

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


@contextmanager
def without_memory() -> Iterator[None]:
    """Networks that are built inside have shapes and no numbers."""
    with torch.device("meta"), _Undrawn():
        yield


class Sizes(NamedTuple):
    """Bytes."""

    checkpoint: int  # weights, averages and optimizers
    model: int  # what is left in the end, with the snapshots of a power EMA
    gradients: int  # of all that is trained, in a step


def training_sizes(training: AnyTraining, dataset_info: DatasetInfo, *, grid: TokenGrid | None = None) -> Sizes:
    """What one checkpoint of a training and its finished model take.

    Args:
        dataset_info: what the data set conditions on.
        grid: of the tokens that a prior learns; None for what learns images.
    """
    with without_memory():
        kept, others = make_network(training, dataset_info, grid), other_networks(training, dataset_info)
    config = training.optimization
    averages = 0 if config.ema_decay == 0 else 2 if config.ema == "power" else 1
    trained = [p for network in (kept, *others) for p in network.parameters() if p.requires_grad]
    weights = _bytes(kept) * (1 + averages) + sum(map(_bytes, others))
    snapshots = sum(is_scheduled(step, config) for step in range(1, config.total_steps + 1)) if averages == 2 else 0
    gradients = sum(map(_tensor_bytes, trained))
    return Sizes(weights + MOMENTS * gradients, _bytes(kept) * (1 + 2 * snapshots), gradients)


def autoencoder_grid(training: AutoencoderTraining) -> TokenGrid:
    """The tokens that an autoencoder will make of an image."""
    with without_memory():
        network = make_network(training)
    return TokenGrid(codebook_size=network.codebook_size, height=network.grid[0], width=network.grid[1])


def other_networks(training: AnyTraining, dataset_info: DatasetInfo) -> tuple[nn.Module, ...]:
    """The networks that are trained with the one that is kept in the end."""
    if isinstance(training, AutoencoderTraining) and training.losses.adversarial_weight > 0:
        losses = training.losses
        return (PatchDiscriminator(channels=losses.discriminator_channels, num_layers=losses.discriminator_layers),)
    if isinstance(training, GANTraining):
        return (ProjectionDiscriminator(**discriminator_arguments(training, dataset_info)),)
    return ()


def _bytes(network: nn.Module) -> int:
    return sum(map(_tensor_bytes, network.state_dict().values()))


def _tensor_bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
