"""Collectives of networks in shards: FSDP2's own, or local copies in a rank that tries its memory."""

from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather, DefaultReduceScatter


class Gather(DefaultAllGather):
    """FSDP2's own all-gather; in a rank by itself (`components.training.parallel.by_itself`) a copy.

    Such a rank takes its own shard in the place of the others': shapes and memory stay, and no rank waits.
    """

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> dist.Work | None:
        if dist.get_world_size() > 1:
            return super().__call__(output_tensor, input_tensor, group, async_op)
        output_tensor.view(group.size(), -1).copy_(input_tensor.view(1, -1).expand(group.size(), -1))
        return None


class Scatter(DefaultReduceScatter):
    """FSDP2's own reduce-scatter; in a rank by itself the rank's part of its own gradients, see `Gather`."""

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> dist.Work:
        if dist.get_world_size() > 1:
            return super().__call__(output_tensor, input_tensor, group, op, async_op)
        output_tensor.copy_(input_tensor.view(group.size(), -1)[group.rank()])
        return dist.Work()
