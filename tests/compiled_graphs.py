"""What torch compiles, told without waiting for a compiler."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn


def recorded_graphs(monkeypatch: pytest.MonkeyPatch) -> list[torch.fx.GraphModule]:
    """The graphs of all modules and decoding steps that are compiled from now on; they run as they are."""
    graphs: list[torch.fx.GraphModule] = []
    compile_module = nn.Module.compile

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., object]:
        del inputs
        graphs.append(graph)
        return graph.forward

    def compile_so(module: nn.Module, **options: Any) -> None:
        compile_module(module, **options | {"backend": backend})

    monkeypatch.setattr(nn.Module, "compile", compile_so)
    monkeypatch.setattr("components.sampling.autoregressive.BACKEND", backend)
    return graphs
