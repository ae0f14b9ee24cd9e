"""Copies of a state in the host's memory, which training that goes on does not move."""

from typing import Any

import torch
from torch import Tensor


def on_host(state: Any) -> Any:
    """A copy of a task's state (dictionaries and lists of tensors and plain values) in the host's memory.

    From a GPU all tensors go at once into pinned memory, which torch keeps for the next copy, and are waited for once.
    """
    copied = _copied(state)
    if torch.cuda.is_initialized():
        torch.cuda.current_stream().synchronize()
    return copied


def _copied(state: Any) -> Any:
    if isinstance(state, Tensor):
        return _copied_tensor(state.detach())
    if isinstance(state, dict):
        return {name: _copied(value) for name, value in state.items()}
    if isinstance(state, list):
        return [_copied(value) for value in state]
    return state


def _copied_tensor(tensor: Tensor) -> Tensor:
    if tensor.device.type != "cuda":
        return tensor.to("cpu", copy=True)
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
