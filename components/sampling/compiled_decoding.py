"""Token-by-token decoding by a single compiled step for every position.

On a GPU a step of a small batch takes as long as its host needs to launch some hundred kernels; there the step is a
CUDA graph, launched as one. A graph knows its tensors by their addresses, so the last cache of a transformer is kept,
and the next batch of its size writes over it. The first batch of each size compiles, which takes about a minute.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from components.models.layers import VARIANTS
from components.models.token_network import KVCache
from components.models.transformer import Transformer

Step = Callable[[Tensor], Tensor]  # tokens (B,) -> the logits (B, K) of the next ones
BACKEND = "inductor"
KEPT: WeakKeyDictionary[Transformer, KVCache] = WeakKeyDictionary()


@contextmanager
def compiled_steps(
    transformer: Transformer, batch_size: int, conditions: Mapping[str, Tensor]
) -> Iterator[tuple[Tensor, Step]]:
    """Yields the first tokens' logits (B, K) and the compiled step for the following tokens.

    No other call writes into the step's cache meanwhile.
    """
    kept = KEPT.pop(transformer, None)
    if kept is not None and len(kept.keys[0]) != batch_size:
        kept = None
    logits, filled = transformer.start(batch_size, **conditions, cache=kept)
    yield logits, step_of(transformer, filled)
    KEPT[transformer] = filled


def step_of(transformer: Transformer, filled: KVCache) -> Step:
    """The compiled step from where the cache stands on."""
    on_gpu = transformer.device.type == "cuda"
    position = torch.tensor(filled.length, device=transformer.device)
    run = program(on_gpu, BACKEND)
    if on_gpu:
        for tensor in (*filled.keys, *filled.values):
            torch._dynamo.mark_static_address(tensor, guard=False)

    def step(tokens: Tensor) -> Tensor:
        if on_gpu:
            torch.compiler.cudagraph_mark_step_begin()  # the logits before are no longer needed
        logits = run(transformer, tokens, position, cache=filled)
        position.add_(1)
        return logits

    return step


@cache
def program(on_gpu: bool, backend: str) -> Callable[..., Any]:
    """`Transformer.step_at`, compiled for each batch size; transformers of one shape share the program."""
    mode = "reduce-overhead" if on_gpu else None  # with CUDA graphs
    return torch.compile(  # pyrefly: ignore[no-matching-overload]
        Transformer.step_at, backend=backend, mode=mode, fullgraph=True, dynamic=False, recompile_limit=VARIANTS
    )
