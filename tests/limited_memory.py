"""Devices that are out of memory above a number of samples at a time, played on a CPU."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from components.training.loop import Task


def out_of_memory() -> torch.OutOfMemoryError:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")


def limit_memory(task: Any, samples: int) -> None:
    """Let the task's steps be out of memory in a forward pass of more than `samples`."""

    def refuse(network: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if network.training and len(inputs[0]) > samples:
            raise out_of_memory()

    network_of(task).register_forward_pre_hook(refuse)


def limit_memory_of_backward(task: Any, samples: int) -> None:
    """Let the task's steps be out of memory in a backward pass of more than `samples`, halfway through the network."""

    def refuse(network: nn.Module, gradients: tuple[Tensor, ...]) -> None:
        if len(gradients[0]) > samples:
            raise out_of_memory()

    parts = [module for module in network_of(task).modules() if isinstance(module, nn.Conv2d)]
    parts[len(parts) // 2].register_full_backward_pre_hook(refuse)


def break_off(task: Any, *, at: int) -> None:
    """Let the task's next step be out of memory once, in forward pass number `at` of its network."""
    calls = itertools.count(1)

    def refuse(network: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if network.training and next(calls) == at:
            raise out_of_memory()

    network_of(task).register_forward_pre_hook(refuse)


def network_of(task: Any) -> nn.Module:
    """The network that is trained, of several the one that is kept."""
    return (task.generator if hasattr(task, "generator") else task.learner).network


@contextmanager
def forwards(task: Task) -> Iterator[list[int]]:
    """The samples of each forward pass of networks like the task's, its averages among them."""
    kind, sizes = type(network_of(task)), []

    def count(network: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if isinstance(network, kind) and inputs:
            sizes.append(len(inputs[0]))

    hook = register_module_forward_pre_hook(count)
    try:
        yield sizes
    finally:
        hook.remove()
