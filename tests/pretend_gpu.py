"""A GPU that is none: tensors of the device `meta` which have numbers all the same, and refuse what a GPU would refuse.

What is given to a network on a GPU must be there too. On a machine without one nobody would notice; here it raises.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

GPU = torch.device("meta")  # the one device without hardware that every build of torch knows
FROM_BOTH = ("aten::copy_", "aten::_to_copy", "aten::index.Tensor", "aten::index_put_")  # a GPU takes those too


class OnGPU(torch.Tensor):
    """A tensor on the GPU; `here` holds its numbers."""

    here: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, here: torch.Tensor) -> "OnGPU":
        about = {"strides": here.stride(), "dtype": here.dtype, "requires_grad": here.requires_grad}
        tensor = torch.Tensor._make_wrapper_subclass(cls, here.shape, device=GPU, **about)
        tensor.here = here
        return tensor

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        return compute(function, arguments, options or {})

    # torch itself would make tensors without numbers of what Python gives these:

    def new_tensor(self, data: Any, **options: Any) -> torch.Tensor:
        return OnGPU(self.here.new_tensor(data, **options))

    def tolist(self) -> Any:
        return self.here.tolist()

    def __getitem__(self, index: Any) -> torch.Tensor:
        places = index if isinstance(index, tuple) else (index,)
        return super().__getitem__(tuple(torch.tensor(p, device=GPU) if isinstance(p, list) else p for p in places))

    def __setitem__(self, index: Any, value: Any) -> None:
        self.here[tree_map(numbers, index)] = numbers(value)


class Computing(TorchDispatchMode):
    """Runs every operator; `count` of them worked on the GPU."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        self.count += any(isinstance(leaf, OnGPU) for leaf in tree_leaves((arguments, options)))
        return compute(function, arguments, options or {})


def compute(function: Any, arguments: Any, options: dict[str, Any]) -> Any:
    """Run an operator. Raises RuntimeError if it is given tensors of both devices; a single number may be of either."""
    tensors = [leaf for leaf in tree_leaves((arguments, options)) if isinstance(leaf, torch.Tensor)]
    there = any(isinstance(tensor, OnGPU) for tensor in tensors)
    elsewhere = [tensor for tensor in tensors if not isinstance(tensor, OnGPU) and tensor.ndim]
    if there and elsewhere and not function.name().startswith(FROM_BOTH):
        raise RuntimeError(
            f"{function.name()}: expected all tensors to be on the GPU, found some of {elsewhere[0].device}"
        )
    if options.get("device") is not None:
        there, options = torch.device(options["device"]) == GPU, options | {"device": torch.device("cpu")}
    made = function(*tree_map(numbers, arguments), **tree_map(numbers, options))
    if function.name().partition(".")[0].endswith("_"):  # in place
        return arguments[0]
    return tree_map(lambda leaf: OnGPU(leaf) if there and isinstance(leaf, torch.Tensor) else leaf, made)


def numbers(leaf: Any) -> Any:
    """A tensor's numbers, wherever it is; anything else as it is."""
    return leaf.here if isinstance(leaf, OnGPU) else leaf


def no_grad(mode: bool = True) -> torch.no_grad:
    del mode
    return torch.no_grad()


@contextmanager
def pretend_gpu() -> Iterator[Computing]:
    """Inside, tensors can be moved to `GPU` and back. Yields what counts the work done there."""
    tensor, as_tensor = torch.tensor, torch.as_tensor
    with (
        mock.patch("torch.tensor", lambda data, *, device=None, **options: tensor(data, **options).to(device)),
        mock.patch("torch.as_tensor", lambda data, *, device=None, **options: as_tensor(data, **options).to(device)),
        mock.patch("components.models.devices.Casting", partial(torch.autocast, "cpu", torch.bfloat16)),
        mock.patch.object(torch.Tensor, "pin_memory", lambda tensor: tensor),
        mock.patch("torch.inference_mode", no_grad),
        Computing() as computing,
    ):
        yield computing
