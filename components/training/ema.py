"""Exponential moving average of the weights, with warm-up, in fp32."""

from copy import deepcopy
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

Network = TypeVar("Network", bound=nn.Module)


class EMA(Generic[Network]):
    """The average of a network's weights: what is sampled from, and what a bundle holds.

    After update n the decay is min(decay, (1 + n) / (10 + n)): without that warm-up a short run's average is mostly the
    random initialization (improved-diffusion issue 59). Buffers are copied. The average is a network of its own, in
    evaluation mode.
    """

    def __init__(self, network: Network, *, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.network = deepcopy(network).float().eval().requires_grad_(False)

    @property
    def averages(self) -> dict[str, Network]:
        """By the name that checkpoints know it by."""
        return {"ema": self.network}

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        """Move the average towards `network`; call after an optimizer step that was taken."""
        self.updates += 1
        weight = 1 - decay_at(self.updates, decay=self.decay)
        masters = [parameter.float() for parameter in network.parameters()]
        averages: list[Tensor] = [*self.network.parameters()]
        torch._foreach_lerp_(averages, masters, weight)
        for average, buffer in zip(self.network.buffers(), network.buffers(), strict=True):
            average.copy_(buffer)


def decay_at(update: int, *, decay: float) -> float:
    """The decay of update `update` (1-based)."""
    return min(decay, (1 + update) / (10 + update))
