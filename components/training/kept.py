"""The bytes that a pass forward keeps for its backward pass, and how many of them blocks keep that could be computed
again.

Counted is each storage once, as `torch.autograd.graph.saved_tensors_hooks` sees them: on a device with numbers, or on
the meta device, where `GPUKernels` keeps what a GPU's kernels of attention and dropout would.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from components.models.network_blocks import blocks_of

Storages = dict[int, Tensor]  # one tensor of each storage, which keeps it, by the storage's identity
DRAWN = {Tensor.exponential_, Tensor.normal_, Tensor.uniform_}


class Kept(NamedTuple):
    """Bytes that a pass keeps, without weights and buffers."""

    whole: int
    recomputed: int  # where blocks keep only what goes into them
    blocks: tuple[int, ...]  # of each block more, while it is computed again


class Keeping:
    """Counts what is kept `during` passes of these networks."""

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        self.blocks = [block for network in networks for block in blocks_of(network).values()]
        self.held = {identity(tensor) for network in networks for tensor in (*network.parameters(), *network.buffers())}
        self.outside, self.arguments, self.inside = Storages(), Storages(), list[Storages]()
        self.open = self.outside

    @contextmanager
    def during(self) -> Iterator[None]:
        """Inside, what is kept is counted."""
        with ExitStack() as stack:
            for block in self.blocks:
                stack.callback(block.register_forward_pre_hook(self.enter, with_kwargs=True).remove)
                stack.callback(block.register_forward_hook(self.leave).remove)
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(self.keep, as_it_is))
            yield

    def keep(self, tensor: Tensor) -> Tensor:
        if identity(tensor) not in self.held:
            self.open[identity(tensor)] = tensor
        return tensor

    def enter(self, block: nn.Module, args: Any, kwargs: Any) -> None:
        arguments = {identity(leaf): leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        self.arguments |= {key: tensor for key, tensor in arguments.items() if key not in self.held}
        self.open = Storages()
        self.inside.append(self.open)

    def leave(self, block: nn.Module, args: Any, output: Any) -> None:
        self.open = self.outside

    def kept(self) -> Kept:
        """What was kept until now."""
        recomputed, whole = self.outside | self.arguments, dict(self.outside)
        for storages in self.inside:
            whole |= storages
        blocks = [bytes_of({key: storages[key] for key in storages.keys() - recomputed}) for storages in self.inside]
        return Kept(bytes_of(whole), bytes_of(recomputed), tuple(blocks))


def kept_by(forward: Callable[[], Any], *networks: nn.Module) -> Kept:
    """What `forward` keeps for its backward pass; what it returns holds the graph, and is let go."""
    keeping = Keeping(networks)
    with keeping.during():
        held = forward()
    del held
    return keeping.kept()


def identity(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def bytes_of(storages: Storages) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())


def as_it_is(tensor: Tensor) -> Tensor:
    return tensor


class WithoutNumbers(TorchFunctionMode):
    """Inside, meta tensors are drawn no numbers, and nothing is pinned, for no copy is made."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.pin_memory or (func in DRAWN and args[0].device.type == "meta"):
            return args[0]
        return func(*args, **(kwargs or {}))


class GPUKernels(WithoutNumbers):
    """Inside, meta tensors also take the kernels that a GPU has: attention without the matrix of all weights, and
    dropout that keeps a byte an element."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, options = getattr(func, "__name__", ""), kwargs or {}
        if name == "scaled_dot_product_attention":
            return fused_attention(*args, **options)
        if name == "dropout" and not options.get("inplace"):
            return fused_dropout(*args, **options)
        return super().__torch_function__(func, types, args, options)


def fused_attention(
    q: Tensor, k: Tensor, v: Tensor, *, attn_mask: Tensor | None = None, is_causal: bool = False
) -> Tensor:
    """What torch's memory-efficient kernel keeps: queries, keys, values, the output and a number for each query."""
    bias = None if attn_mask is None else attn_mask.to(q.dtype).expand(*q.shape[:3], k.shape[2])
    return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, True, 0.0, is_causal)[0]


def fused_dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return torch.native_dropout(input, p, True)[0] if training and p > 0 else input
