"""Counts how often the host waits for its device, on the meta device, which has shapes and no numbers.

A wait is a number that is read (`item`, `bool`, `tolist`, `cpu`), a shape that depends on numbers (`nonzero`, a mask as
an index), or a copy to the device from memory that is not pinned. Copies that do not wait say so themselves:
`non_blocking`, and to the device from pinned memory. What a meta device lacks (generators, a fused optimizer, pinned
memory) is stood in for; nothing else of a training is.
"""

import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from components.training.step_model import KnownLayouts

META = torch.device("meta")
aten = torch.ops.aten
READS = {aten._local_scalar_dense.default, aten.is_nonzero.default, aten.equal.default}
SHAPES = {
    aten.nonzero.default,
    aten.bincount.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.repeat_interleave.Tensor,
}
INDEXED = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}
COPIES = {aten._to_copy.default, aten.copy_.default}
FUSED = {aten._fused_adamw_.default, aten._fused_sgd_.tensor_lr}
MAKERS = {torch.tensor, torch.as_tensor, torch.asarray}


class DeviceReads(TorchDispatchMode):
    """Counts waits by the line of this package that asks for them."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.pinned: set[int] = set()  # storages

    def count(self, what: str) -> None:
        self.counts[f"{what} at {asking_line()}"] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in COPIES:
            return self.copied(func, args, kwargs)
        if not any(isinstance(each, Tensor) and each.device.type == "meta" for each in tree_leaves((args, kwargs))):
            return func(*args, **kwargs)
        if func in READS:
            self.count("a number read")
            return func is not aten.equal.default
        if func in SHAPES:
            self.count("a shape read")
            return found(func, args, kwargs)
        if func in INDEXED:
            return self.indexed(func, args, kwargs)
        if func in FUSED:
            return None
        return func(*args, **kwargs)

    def copied(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Copies between the device and the host; others are left alone."""
        source, wanted = (args[1], args[0].device) if func is aten.copy_.default else (args[0], kwargs.get("device"))
        waits = not (kwargs.get("non_blocking") or (func is aten.copy_.default and len(args) > 2 and args[2]))
        if wanted is None or (source.device.type == "meta") == (torch.device(wanted).type == "meta"):
            return func(*args, **kwargs)
        if source.device.type == "meta":
            if waits:
                self.count("a copy to the host")
            made = torch.zeros(source.shape, dtype=kwargs.get("dtype") or source.dtype)
            return args[0].zero_() if func is aten.copy_.default else made
        if waits or source.untyped_storage().data_ptr() not in self.pinned:
            self.count("a copy to the device")
        return func(*args, **kwargs)

    def indexed(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Masks as indices become the places where they are set, and indices on the host are copied."""
        indices = [index for index in args[1] if index is not None]
        if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
            self.count("a shape read")
            places = [torch.empty(len(args[0]), dtype=torch.long, device=META)]
            return args[0] if "put" in str(func) else func(args[0], places, **kwargs)
        if any(index.device.type == "cpu" for index in indices):
            self.count("a copy to the device")
        return func(*args, **kwargs)


class DeviceMakers(TorchFunctionMode):
    """What never reaches the dispatcher: lists that become tensors on the device, and memory that is pinned."""

    def __init__(self, reads: DeviceReads) -> None:
        super().__init__()
        self.reads = reads

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.pin_memory:
            copy = args[0].clone()
            self.reads.pinned.add(copy.untyped_storage().data_ptr())
            return copy
        if func in MAKERS and torch.device(kwargs.get("device") or "cpu").type == "meta":
            self.reads.count("a copy to the device")
        return func(*args, **kwargs)


def found(func: Any, args: Any, kwargs: Any) -> Any:
    """What an operator of unknown shape gives, as large as it can be."""
    if func is aten.nonzero.default:
        return torch.empty(args[0].numel(), args[0].ndim, dtype=torch.long, device=META)
    if func is aten.bincount.default:
        return torch.empty(kwargs.get("minlength", 1), dtype=torch.long, device=META)
    return torch.empty(args[0].numel(), dtype=args[0].dtype, device=META)


def asking_line() -> str:
    """file:line of the innermost frame inside `components`."""
    own = [frame for frame in traceback.extract_stack() if "/components/" in frame.filename]
    return f"{own[-1].filename.split('/components/')[-1]}:{own[-1].lineno}" if own else "no component"


class HostGenerator(torch.Generator):
    """A generator of the host where one of the meta device is asked for."""

    def __new__(cls, device: Any = "cpu") -> "HostGenerator":
        return super().__new__(cls, "cpu" if torch.device(device).type == "meta" else device)


@contextmanager
def device_reads() -> Iterator[DeviceReads]:
    """Inside, what runs on the meta device is counted."""
    reads = DeviceReads()
    with ExitStack() as stack:
        fused = mock.Mock(return_value=["meta"])
        stack.enter_context(mock.patch("torch.optim.optimizer._get_fused_kernels_supported_devices", fused))
        stack.enter_context(mock.patch("torch.Generator", HostGenerator))
        for mode in (DeviceMakers(reads), KnownLayouts(), reads):
            stack.enter_context(mode)
        yield reads
