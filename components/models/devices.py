"""Devices: transfers without a wait of the host, and autocast to bf16 around parts in fp32.
torch's own autocast knows no meta device. A computation there stands for the computation of a GPU, so `Casting` casts
as CUDA's autocast documents (docs.pytorch.org, "Automatic Mixed Precision package", CUDA op-specific behavior)."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar, Token
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map


def state_products(precision: str) -> None:
    """Set how this process computes products by a `Precision`, for matrices and convolutions alike.
    Sums of bf16 products are fp32: torch by default lets parts of long ones be added in bf16."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False


@contextmanager
def products(precision: str) -> Iterator[None]:
    """Sets `state_products` inside the context only, for work in processes that others own."""
    matrices, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matrices.allow_tf32, convolutions.allow_tf32, matrices.allow_bf16_reduced_precision_reduction
    state_products(precision)
    try:
        yield
    finally:
        matrices.allow_tf32, convolutions.allow_tf32, matrices.allow_bf16_reduced_precision_reduction = before


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Copy the tensor to `device`, or return a tensor that is there unchanged.
    A copy to an accelerator goes from pinned memory, in the order of the current stream: from pageable memory the host
    would wait until the device has done all earlier work."""
    device = torch.device(device)
    if device.type == "cpu" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class ToldLater:
    """Numbers of a device for a later look: the copy starts now, and has arrived by then."""

    def __init__(self, tensor: Tensor) -> None:
        self.copy = tensor.detach().to("cpu", non_blocking=True)  # pinned, from a GPU
        self.arrival: torch.cuda.Event | None = None
        if tensor.device.type == "cuda":
            self.arrival = torch.cuda.Event()
            self.arrival.record(torch.cuda.current_stream(tensor.device))

    @property
    def has_arrived(self) -> bool:
        return self.arrival is None or self.arrival.query()

    def read(self) -> Tensor:
        """The tensor on the host, after a wait where the copy has not arrived yet."""
        if self.arrival is not None:
            self.arrival.synchronize()
        return self.copy


BF16 = """
__matmul__ addbmm addmm addmv baddbmm bilinear bmm
chain_matmul einsum linear conv1d conv2d conv3d
conv_transpose1d conv_transpose2d conv_transpose3d
matmul mm mv multi_dot prelu
scaled_dot_product_attention
"""
FP32 = """
__pow__ __rdiv__ __rpow__ acos asin
binary_cross_entropy_with_logits cdist cosh
cosine_similarity cross_entropy cumprod cumsum dist
erfinv exp expm1 group_norm kl_div l1_loss
layer_norm log log10 log1p log2 log_softmax mse_loss
nll_loss norm normalize pow prod reciprocal rsqrt
sinh smooth_l1_loss softmax softmin softplus sum tan
"""
IN_BF16, IN_FP32 = frozenset(BF16.split()), frozenset(FP32.split())


def autocast(device: torch.device, *, enabled: bool, cache_enabled: bool | None = None) -> AbstractContextManager[Any]:
    """Context of bf16 products on the device, or, not enabled, of products in the inputs' dtype."""
    if device.type == "meta":
        return Casting(enabled=enabled)
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled, cache_enabled=cache_enabled)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype of products on the device under autocast; None: the inputs' dtype."""
    if device.type == "meta":
        casting = _innermost.get()
        return torch.bfloat16 if casting is not None and casting.enabled else None
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


class Casting(TorchFunctionMode):
    """Autocast of the meta device; of nested contexts the innermost counts.
    Copies of weights are made once and live as long as the outermost context."""

    def __init__(self, *, enabled: bool) -> None:
        super().__init__()
        self.enabled = enabled
        self.copies: dict[int, Tensor] = {}  # of weights, by their ids
        self.tokens: list[Token[Casting | None]] = []

    def __enter__(self) -> "Casting":
        outer = _innermost.get()
        self.copies = {} if outer is None else outer.copies
        self.tokens.append(_innermost.set(self))
        return super().__enter__()

    def __exit__(self, exc_type: Any, exc_val: Any, exc_tb: Any) -> None:
        super().__exit__(exc_type, exc_val, exc_tb)
        _innermost.reset(self.tokens.pop())

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, options = getattr(func, "__name__", ""), kwargs or {}
        dtype = torch.bfloat16 if name in IN_BF16 else torch.float32 if name in IN_FP32 else None
        if dtype is None or not self.enabled or _innermost.get() is not self:
            return func(*args, **options)
        cast_args, cast_options = tree_map(partial(self.cast, dtype=dtype), (args, options))
        return func(*cast_args, **cast_options)

    def cast(self, leaf: Any, *, dtype: torch.dtype) -> Any:
        """Cast a tensor of at most 32 bits to `dtype`; leave anything else unchanged."""
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point() or leaf.dtype in (dtype, torch.float64):
            return leaf
        if not (leaf.is_leaf and leaf.requires_grad):
            return leaf.to(dtype)
        if id(leaf) not in self.copies:
            self.copies[id(leaf)] = leaf.to(dtype)
        return self.copies[id(leaf)]


_innermost: ContextVar[Casting | None] = ContextVar("_innermost", default=None)
