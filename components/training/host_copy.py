"""Copies of a state in the host's memory, which training that goes on does not move."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from components.training.parallel import gathered, local


def on_host(state: Any) -> Any:
    """A copy of a task's state (dictionaries and lists of tensors and plain values) in the host's memory; of tensors in
    shards, this rank's.

    From a GPU all tensors go at once into pinned memory, which torch keeps for the next copy, and are waited for once.
    """
    return _waited_for(_mapped(state, lambda tensor: _copied(local(tensor.detach()))))


def gathered_on_host(state: Any, *, kept: bool) -> Any:
    """As `on_host`, with tensors in shards as the whole ones that they are of; None where this rank does not keep it.

    Called by all ranks, which gather one tensor at a time: no device holds more than one whole.
    """

    def copied(tensor: Tensor) -> Tensor | None:
        whole = gathered(tensor.detach())
        return _copied(whole) if kept else None

    found = _waited_for(_mapped(state, copied))
    return found if kept else None


def _waited_for(copied: Any) -> Any:
    if torch.cuda.is_initialized():
        torch.cuda.current_stream().synchronize()
    return copied


def _mapped(state: Any, change: Callable[[Tensor], Any]) -> Any:
    if isinstance(state, Tensor):
        return change(state)
    if isinstance(state, dict):
        return {name: _mapped(value, change) for name, value in state.items()}
    if isinstance(state, list):
        return [_mapped(value, change) for value in state]
    return state


def _copied(tensor: Tensor) -> Tensor:
    if tensor.device.type != "cuda":
        return tensor.to("cpu", copy=True)
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
