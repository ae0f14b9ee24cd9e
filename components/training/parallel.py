"""A worker's place among all workers, and the few collectives of training."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


class Worker(NamedTuple):
    """Rank and device of a task. The default is a single process on the CPU."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = torch.device("cpu")
    shards: bool = False  # networks are cut among the ranks; see `components.training.sharding`
    replicas: int = 1  # copies of a network in shards; the ranks of a copy follow each other

    @property
    def parts(self) -> int:
        """Ranks among whom a network in shards is cut."""
        return self.world_size // self.replicas

    @property
    def part(self) -> int:
        """The rank's place among them."""
        return self.rank % self.parts

    def share(self, global_batch_size: int) -> int:
        """Samples of the rank in each step. Raises ValueError if the ranks' shares would differ."""
        if global_batch_size % self.world_size:
            raise ValueError(
                f"global_batch_size {global_batch_size} must be a multiple of the {self.world_size} workers"
            )
        return global_batch_size // self.world_size


ALONE = Worker()


def data_parallel(network: nn.Module, worker: Worker) -> nn.Module:
    """Wraps a network so that gradients are averaged over ranks; no change for a single rank or shards.
    Training moves buffers (the codebook) equally on all ranks."""
    if worker.world_size == 1 or worker.shards:
        return network
    device_ids = [worker.device] if worker.device.type == "cuda" else None
    return DistributedDataParallel(
        network, device_ids=device_ids, broadcast_buffers=False, gradient_as_bucket_view=True
    )


@contextmanager
def by_itself(worker: Worker) -> Iterator[None]:
    """Restricts every collective inside, also of networks, to the calling rank, which may fail anywhere."""
    if worker.world_size == 1:
        yield
        return
    everyone, itself = dist.group.WORLD, dist.new_group([worker.rank], use_local_synchronization=True)
    assert isinstance(itself, dist.ProcessGroup)  # ranks outside the group get a number
    dist.group.WORLD = itself
    try:
        yield
    finally:
        dist.group.WORLD = everyone
        dist.destroy_process_group(itself)


def is_cut(tensor: Tensor) -> bool:
    """True for a tensor in shards, a DTensor; told by an attribute, for its import takes 0.7 s."""
    return hasattr(tensor, "full_tensor")


def shard_rows(length: int, part: int, parts: int) -> tuple[int, int]:
    """First row, and the row after the last, of a part of a tensor in shards: FSDP2 cuts as `torch.chunk`."""
    size = -(-length // parts)
    return min(part * size, length), min((part + 1) * size, length)


def local(tensor: Tensor) -> Tensor:
    """The calling rank's shard of a tensor, without a copy; a whole tensor unchanged."""
    return tensor.to_local() if is_cut(tensor) else tensor  # pyrefly: ignore[missing-attribute]


def average(tensor: Tensor, worker: Worker) -> Tensor:
    """The mean over all ranks, out of place."""
    if worker.world_size == 1:
        return tensor
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def gather(tensor: Tensor, worker: Worker) -> Tensor:
    """Gathers (B, ...) of all ranks in the order of the stream, without gradient: (B * world_size, ...).
    Each rank has every world_size-th sample, from its rank on. Alone, copies of its own."""
    if worker.world_size == 1:
        return tensor
    if dist.get_world_size() == 1:
        return torch.cat([tensor] * worker.world_size)
    parts = [torch.empty_like(tensor) for _ in range(worker.world_size)]
    dist.all_gather(parts, tensor.contiguous())
    return torch.stack(parts, dim=1).flatten(0, 1)


def lowest(number: int, worker: Worker) -> int:
    """The smallest of all ranks' numbers; all ranks get the same answer, without a wait for devices."""
    if worker.world_size == 1:
        return number
    world = dist.group.WORLD
    assert world is not None
    answer = torch.tensor(number)
    group = world if dist.get_backend(world) == "gloo" else host_group(world)
    dist.all_reduce(answer, op=dist.ReduceOp.MIN, group=group)
    return int(answer)


def any_rank(flag: bool, worker: Worker) -> bool:
    """True if `flag` is set on any rank; all ranks get the same answer."""
    return lowest(int(not flag), worker) == 0


@cache
def host_group(world: dist.ProcessGroup) -> dist.ProcessGroup:
    """The ranks of `world` over gloo, on the CPU, made once: all ranks make the first call."""
    del world
    group = dist.new_group(backend="gloo")
    assert isinstance(group, dist.ProcessGroup)  # ranks outside the group get a number
    return group
