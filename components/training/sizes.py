"""How many bytes a training writes and holds, told from its configuration alone: networks are built without memory."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from components.configuration.dataset_info import DatasetInfo, TokenGrid
from components.configuration.trainings import AnyTraining, AutoencoderTraining
from components.models.network_blocks import blocks_of
from components.training.building import make_discriminator, make_network
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
    averages = averages_of(training)
    trained = [p for network in (kept, *others) for p in network.parameters() if p.requires_grad]
    weights = _bytes(kept) * (1 + averages) + sum(map(_bytes, others))
    snapshots = sum(is_scheduled(step, config) for step in range(1, config.total_steps + 1)) if averages == 2 else 0
    gradients = sum(map(_tensor_bytes, trained))
    return Sizes(weights + MOMENTS * gradients, _bytes(kept) * (1 + 2 * snapshots), gradients)


class DeviceBytes(NamedTuple):
    """What each device of a training holds between activations, in bytes."""

    weights: int
    gradients: int
    optimizer: int
    averages: int
    gathered: int  # of shards, what is whole for a moment: see `device_bytes`


def device_bytes(
    training: AnyTraining, dataset_info: DatasetInfo, *, grid: TokenGrid | None = None, shards: int = 1
) -> DeviceBytes:
    """What each device holds; arguments as of `training_sizes`.

    Args:
        shards: devices that hold a part each, cut along the first dimension; 1: each holds all.

    Gathered are, while a block goes backward, its weights and gradients and the weights of the block that comes next,
    and weights and gradients of what belongs to no block.
    """
    with without_memory():
        kept, others = make_network(training, dataset_info, grid), other_networks(training, dataset_info)
    networks = (kept, *others)
    trained = [p for network in networks for p in network.parameters() if p.requires_grad]
    gradients = sum(_part(parameter, shards) for parameter in trained)
    return DeviceBytes(
        weights=sum(_parts(network, shards) for network in networks),
        gradients=gradients,
        optimizer=MOMENTS * gradients,
        averages=averages_of(training) * _parts(kept, shards),
        gathered=0 if shards == 1 else _gathered(kept),
    )


def averages_of(training: AnyTraining) -> int:
    """How many averages of its weights a training keeps."""
    config = training.optimization
    return 0 if config.ema_decay == 0 else 2 if config.ema == "power" else 1


def autoencoder_grid(training: AutoencoderTraining) -> TokenGrid:
    """The tokens that an autoencoder will make of an image."""
    with without_memory():
        network = make_network(training)
    return TokenGrid(codebook_size=network.codebook_size, height=network.grid[0], width=network.grid[1])


def other_networks(training: AnyTraining, dataset_info: DatasetInfo) -> tuple[nn.Module, ...]:
    """The networks that are trained with the one that is kept in the end."""
    discriminator = make_discriminator(training, dataset_info)
    return () if discriminator is None else (discriminator,)


def _gathered(network: nn.Module) -> int:
    blocks = [_bytes(block) for block in blocks_of(network).values()]
    return 2 * (_bytes(network) - sum(blocks)) + 3 * max(blocks, default=0)


def _parts(network: nn.Module, shards: int) -> int:
    """A device's share of a network's tensors; buffers are whole on each."""
    parameters = {name for name, _ in network.named_parameters()}
    tensors = network.state_dict()
    return sum(_part(tensor, shards if name in parameters else 1) for name, tensor in tensors.items())


def _part(tensor: torch.Tensor, shards: int) -> int:
    """The largest part of a tensor in so many parts along its first dimension."""
    if tensor.ndim == 0:
        return _tensor_bytes(tensor)
    return _tensor_bytes(tensor) // max(1, len(tensor)) * -(-len(tensor) // shards)


def _bytes(network: nn.Module) -> int:
    return sum(map(_tensor_bytes, network.state_dict().values()))


def _tensor_bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
