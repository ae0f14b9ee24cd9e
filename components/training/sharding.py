"""Networks in shards: a part of all weights, gradients, averages and optimizer state on each rank.

By FSDP2 of torch (Zhao et al., 2023, "PyTorch FSDP", and torch's `fully_shard`): every tensor is cut along its first
dimension. A block's weights are gathered from all ranks when its forward or backward pass begins and freed when it
ends; its gradients are summed into their shards. Parameters outside of blocks are gathered with the root. With copies
(`sharding: 8`, HSDP) a network is cut among so many ranks that follow each other, and gradients are averaged over the
copies. Any number of ranks goes on from a checkpoint (`checkpoint.py`), sharded or not. FSDP2 is imported where a
network is cut: that takes 0.7 s, and every `cascade` command reads this file."""

from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import partial
from itertools import chain, compress
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from components.models.devices import autocast_dtype
from components.models.layers import blocks_of, rounded_maps
from components.training.checkpoint import StoredTensor
from components.training.parallel import Worker, average, is_cut, local, shard_rows


def shard(network: nn.Module, worker: Worker) -> Callable[[nn.Module], nn.Module]:
    """Cut a network into shards on workers' devices, in place. Returns a `deepcopy` for sharded networks.
    The first rank's weights count, those of other ranks may be on the meta device. They go to all ranks tensor by
    tensor, so no other host and no device ever holds them all."""
    values = [tensor.detach() for tensor in (*network.parameters(), *network.buffers())]
    empty = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in network.parameters()}
    bare = deepcopy(network, empty)  # with parameters on the meta device, without memory
    network.to("meta")
    cut(network, worker)
    network.to_empty(device=worker.device)
    values.reverse()
    with torch.no_grad():
        for own in (*network.parameters(), *network.buffers()):
            value = values.pop().contiguous()
            value = value.to(worker.device) if worker.rank == 0 else torch.empty_like(value, device=worker.device)
            dist.broadcast(value, src=0)
            rows = shard_rows(len(value), worker.part, worker.parts) if is_cut(own) else ()
            local(own).copy_(value[slice(*rows)] if rows else value)
    return partial(sharded_copy, bare=bare, worker=worker)


def cut(network: nn.Module, worker: Worker) -> None:
    """Shard a network in place, except parameters without a dimension, such as a temperature."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if worker.device.type == "cuda":
        torch.cuda.set_device(worker.device)  # the mesh takes the current one
    network.to(memory_format=torch.contiguous_format)  # pyrefly: ignore[no-matching-overload]
    shape = (worker.replicas, worker.parts) if worker.replicas > 1 else (worker.parts,)
    mesh = init_device_mesh(worker.device.type, shape, mesh_dim_names=("replica", "part")[-len(shape) :])
    whole = {parameter for parameter in network.parameters() if parameter.ndim == 0}
    for parameter in whole:
        parameter.data = parameter.data.to("meta" if parameter.is_meta else worker.device)
    for module in (*blocks_of(network).values(), network):
        # The root frees its weights too: between two passes all parameters are shards.
        part = fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
        gather, scatter = collectives(part, rounded_maps(module) if module is not network else set())
        part.set_custom_all_gather(gather)
        part.set_custom_reduce_scatter(scatter)


def average_copies(network: nn.Module, worker: Worker, *, now: bool) -> None:
    """Says whether next gradients in shards are averaged over copies; else each copy adds them up."""
    if worker.replicas > 1:
        from torch.distributed.fsdp import FSDPModule

        assert isinstance(network, FSDPModule)
        network.set_requires_all_reduce(now)


def collectives(part: Any, maps: set[nn.Module]) -> tuple[Any, Any]:
    """FSDP2's own all-gather and reduce-scatter; in a rank by itself (`parallel.by_itself`) copies.
    It takes its own shard in the place of the others', and its part of its own gradients: no rank waits. Under autocast
    weights of `maps`, which it would round after, travel in bf16: half the traffic, the same bits."""
    from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather, DefaultReduceScatter
    from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState

    state = part._get_fsdp_state()._fsdp_param_group  # None without parameters

    class Gather(DefaultAllGather):
        rounds = False  # in the last forward pass, and so in its backward pass, which autocast does not reach

        def __call__(
            self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
        ) -> dist.Work | None:
            if state._training_state is TrainingState.FORWARD:
                self.rounds = bool(maps) and autocast_dtype(input_tensor.device) is torch.bfloat16
            if not self.rounds:
                return self.gather(output_tensor, input_tensor, group, async_op)
            sizes = [parameter.padded_sharded_param_size.numel() for parameter in state.fsdp_params]
            rounded = [parameter._module_info.module in maps for parameter in state.fsdp_params]
            wholes, shards = output_tensor.view(group.size(), -1).split(sizes, 1), input_tensor.split(sizes)
            for dtype in (torch.float32, torch.bfloat16):
                of_dtype = [here == (dtype is torch.bfloat16) for here in rounded]
                if not any(of_dtype):
                    continue
                sent = torch.cat([*compress(shards, of_dtype)]).to(dtype)
                received = sent.new_empty(group.size() * len(sent))
                self.gather(received, sent, group)
                columns = received.view(group.size(), -1).split([*compress(sizes, of_dtype)], 1)
                torch._foreach_copy_([*compress(wholes, of_dtype)], columns)
            return None

        def gather(self, whole: Tensor, shard: Tensor, group: dist.ProcessGroup, async_op: bool = False) -> Any:
            if dist.get_world_size() > 1:
                return super().__call__(whole, shard, group, async_op)
            whole.view(group.size(), -1).copy_(shard.expand(group.size(), -1))
            return None

    class Scatter(DefaultReduceScatter):
        def __call__(
            self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, *how: Any, **more: Any
        ) -> dist.Work:
            if dist.get_world_size() > 1:
                return super().__call__(output_tensor, input_tensor, group, *how, **more)
            output_tensor.copy_(input_tensor.view(group.size(), -1)[group.rank()])
            return dist.Work()

    return Gather(), Scatter()


def sharded_copy(network: nn.Module, *, bare: nn.Module, worker: Worker) -> nn.Module:
    """Copies a sharded network, by `bare`, a copy without numbers."""
    copy = deepcopy(bare)
    cut(copy, worker)
    copy.to_empty(device=worker.device)
    with torch.no_grad():
        for new, old in zip(*(chain(each.parameters(), each.buffers()) for each in (copy, network)), strict=True):
            local(new).copy_(local(old))
    return copy


def placed(value: Tensor | StoredTensor, like: Tensor) -> Tensor:
    """Places `value`, whole, stored or the rank's shard, like `like`: its cut, memory layout, device."""
    if not is_cut(like):
        value = whole(value)
        return value if value.stride() == like.stride() else torch.empty_like(like, device=value.device).copy_(value)
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    if isinstance(value, StoredTensor):
        mesh = like.device_mesh["part"]
        value = value.rows(*shard_rows(value.length, mesh.get_local_rank(), mesh.size()))
    elif value.shape == like.shape:
        return distribute_tensor(value.contiguous(), like.device_mesh, like.placements, src_data_rank=None)
    value = value.to(like.device)
    return DTensor.from_local(value, like.device_mesh, like.placements, shape=like.shape, stride=like.stride())


def whole(value: Tensor | StoredTensor) -> Tensor:
    """The whole tensor of a checkpoint. Raises DamagedFileError."""
    return value.rows(0, value.length) if isinstance(value, StoredTensor) else value


@torch.no_grad()
def load_weights(network: nn.Module, weights: Mapping[str, Tensor | StoredTensor]) -> None:
    """Load weights, whole, stored or the rank's shards. Raises KeyError for weights of other names."""
    own = network.state_dict()
    if not any(map(is_cut, own.values())):
        network.load_state_dict({name: whole(tensor) for name, tensor in weights.items()})
        return
    from torch.distributed.fsdp import FSDPModule

    assert isinstance(network, FSDPModule)
    if network._get_fsdp_state()._is_root:  # FSDP2 refuses the call before the first pass
        network.reset_iter_state()  # frees the remains of a pass that broke off
    if own.keys() != weights.keys():
        raise KeyError(f"weights of other names: {sorted(own.keys() ^ weights.keys())[:3]}")
    for name, tensor in own.items():
        local(tensor).copy_(local(placed(weights[name], tensor)))


def placed_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's state, with moments placed like their parameters."""
    parameters = list(chain.from_iterable(group["params"] for group in optimizer.param_groups))
    placed_state = {
        index: {name: value if name == "step" else placed(value, parameters[index]) for name, value in moments.items()}
        for index, moments in state["state"].items()
    }
    return {**state, "state": placed_state}


def clip(network: nn.Module, worker: Worker, *, max_norm: float | None) -> Tensor:
    """The norm () of all gradients together, which are scaled down to `max_norm`; None: they stay."""
    gradients = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
    if not worker.shards:
        if max_norm is None:
            return nn.utils.get_total_norm(gradients)
        return nn.utils.clip_grad_norm_(network.parameters(), max_norm)
    # Gradients of parameters that are whole on all ranks are averaged first: FSDP2 leaves them alone.
    parts = [local(gradient) for gradient in gradients if is_cut(gradient)]
    uncut = [gradient for gradient in gradients if not is_cut(gradient)]
    for gradient in uncut:
        gradient.copy_(average(gradient, worker))
    square = nn.utils.get_total_norm(parts).square()
    dist.all_reduce(square)
    square = square / worker.replicas  # each copy has the same gradients
    if uncut:
        square = square + nn.utils.get_total_norm(uncut).square()
    norm = square.sqrt()
    if max_norm is not None:
        torch._foreach_mul_([*parts, *uncut], (max_norm / (norm + 1e-6)).clamp(max=1.0))  # as torch clips
    return norm
