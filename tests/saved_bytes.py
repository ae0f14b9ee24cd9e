"""What a network keeps for its backward pass, counted on the meta device under the autocast that a GPU would have.

`torch.autocast` knows no meta device: `gpu_autocast` stands in for it, by the lists of its documentation (what runs in
bf16, what in fp32). Other operators keep the types that they are given.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

IN_BF16 = {"linear", "conv1d", "conv2d", "matmul", "__matmul__", "bmm", "mm", "einsum", "scaled_dot_product_attention"}
IN_FP32 = {
    "group_norm",
    "layer_norm",
    "softmax",
    "log_softmax",
    "cross_entropy",
    "mse_loss",
    "exp",
    "pow",
    "sum",
    "norm",
}


class Casting(TorchFunctionMode):
    """Casts what an operator is given; `enabled` as the innermost autocast says."""

    enabled = True

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        name, options = getattr(function, "__name__", ""), options or {}
        dtype = torch.bfloat16 if name in IN_BF16 else torch.float32 if name in IN_FP32 else None
        if self.enabled and dtype is not None:
            arguments, options = tree_map(lambda leaf: cast(leaf, dtype), (arguments, options))
        if name == "scaled_dot_product_attention":
            return fused_attention(*arguments, **options)
        return function(*arguments, **options)


def cast(leaf: Any, dtype: torch.dtype) -> Any:
    """A tensor of floats in this type, anything else as it is."""
    return leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


def fused_attention(q: Tensor, k: Tensor, v: Tensor, *, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
    """As a GPU computes it, without the matrix of all weights, which the meta device would keep."""
    bias = None if attn_mask is None else attn_mask.to(q.dtype).expand(*q.shape[:3], k.shape[2])
    return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, True, 0.0, is_causal)[0]


@contextmanager
def gpu_autocast() -> Iterator[None]:
    """Inside, meta tensors are computed with as CUDA's autocast to bf16 would compute with them."""
    with Casting() as casting:

        @contextmanager
        def autocast(kind: str, *, enabled: bool = True, **options: Any) -> Iterator[None]:
            del kind, options
            before, casting.enabled = casting.enabled, enabled
            try:
                yield
            finally:
                casting.enabled = before

        enabled = {"side_effect": lambda kind=None: casting.enabled}
        with (
            mock.patch("torch.autocast", autocast),
            mock.patch("torch.is_autocast_enabled", **enabled),
            mock.patch("torch.get_autocast_dtype", return_value=torch.bfloat16),
        ):
            yield


def saved_bytes(forward: Callable[[], Any]) -> int:
    """Bytes of all storages that `forward` keeps for its backward pass, each counted once."""
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        held = forward()
    del held
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def bytes_a_sample(forward: Callable[[int], Any]) -> int:
    """What a sample more costs, of a forward pass that is given its number of samples: weights are no part of it."""
    with gpu_autocast():
        return saved_bytes(lambda: forward(2)) - saved_bytes(lambda: forward(1))
