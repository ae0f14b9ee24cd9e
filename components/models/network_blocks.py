"""The blocks that a network is made of: what is compiled, computed again in the backward pass, and sharded, each by
itself. Names of weights know nothing of it.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

VARIANTS = 256  # of one class of blocks in one network: sizes, with and without gradient


class NetworkBlock(nn.Module):
    """A part of a network that comes many times in it, each time after another."""

    recomputed = False  # in the backward pass, instead of keeping what it needs of the forward pass

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.recomputed and torch.is_grad_enabled():
            return checkpoint(super().__call__, *args, use_reentrant=False, **kwargs)  # restores autocast and dropout
        return super().__call__(*args, **kwargs)


def blocks_of(network: nn.Module) -> dict[str, NetworkBlock]:
    """The blocks of a network by their names in it; none that stands in another one."""
    return dict(_outermost(network, ""))


def _outermost(module: nn.Module, prefix: str) -> Iterator[tuple[str, NetworkBlock]]:
    for name, child in module.named_children():
        if isinstance(child, NetworkBlock):
            yield prefix + name, child
        else:
            yield from _outermost(child, f"{prefix}{name}.")


def recompute_blocks(network: nn.Module) -> None:
    """From now on only what goes into each block is kept for the backward pass, and the block is computed again there
    (Chen et al., 2016, "Training Deep Nets with Sublinear Memory Cost"): the same gradients, bit for bit, with less
    memory and a third more time."""
    for block in blocks_of(network).values():
        block.recomputed = True


def compile_blocks(network: nn.Module, *, backend: str = "inductor") -> None:
    """Compile a network in place, when it is first called: block by block, of which equal ones are compiled once, or as
    a whole where it has none. Copies, such as an average's network, are not compiled.

    Each size is compiled by itself: one for all sizes would be slower, and round otherwise once a second one came.
    """
    for part in blocks_of(network).values() or [network]:
        part.compile(backend=backend, dynamic=False, recompile_limit=VARIANTS)
