"""Draw the tokens or values of images in raster order: from transformers, PixelCNN and PixelRNN.

Order of the filters: temperature, top-k, softmax, top-p. Tokens as likely as the k-th all survive top-k; top-p keeps
the most likely tokens until their mass reaches p, the one that reaches it included, so at least one survives.
Guidance: Ho & Salimans 2022, "Classifier-Free Diffusion Guidance", equation 6 on logits, with guidance_scale = 1 + w.

An image depends on its own generator and conditions, not on the rest of the batch.

Shapes: B images, N tokens or values of an image, L text_length, M condition tokens, K codebook_size, C colors,
H W height and width of the grid, h w the grid of the prior's training.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from einops import rearrange
from torch import Tensor

from components.configuration.sampling import TokenSampling
from components.models.layers import VARIANTS
from components.models.masked import PixelNetwork
from components.models.token_network import KVCache
from components.models.transformer import Transformer
from components.sampling.plan import UNCONDITIONED, Conditions

OnToken = Callable[[int, int], None]  # (values done, all values)
Steps = Callable[[Tensor, int, dict[str, Tensor]], Iterator[Tensor]]  # (values (N, B), copies, conditions) -> logits
DEFAULTS = TokenSampling()
BACKEND = "inductor"
KEPT: WeakKeyDictionary[Transformer, KVCache] = WeakKeyDictionary()


def generate(
    transformer: Transformer,
    conditions: Conditions = UNCONDITIONED,
    *,
    generators: Sequence[torch.Generator],
    sampling: TokenSampling = DEFAULTS,
    grid: tuple[int, int] | None = None,
    compiled: bool = False,
    on_token: OnToken | None = None,
) -> Tensor:
    """Sample one token sequence (B, N) int64 in [0, K) for each generator, on the transformer's device.

    Args:
        transformer: in eval mode.
        conditions: label (B,), text (B, L) and condition (B, M), as the model takes them, and the null of each.
        generators: one CPU generator an image, B in all; each gives N uniform numbers.
        sampling: temperature 0 takes the most likely token each time.
        grid: (H, W) in tokens, at least the trained one, see `window_logits`. None: the trained one.
        compiled: step by `compiled_logits`: the same tokens but for rounding.
    Raises ValueError, in one line, for a condition that does not fit the grid."""
    steps: Steps = partial(compiled_logits if compiled else cached_logits, transformer)
    if grid is not None and grid != transformer.grid:
        check_grid(transformer, grid, conditions.condition.get("condition"))
        steps = partial(window_logits, transformer, grid)
    count = transformer.num_tokens if grid is None else grid[0] * grid[1]
    return draw_in_order(
        steps, count, conditions, generators=generators, sampling=sampling, device=transformer.device, on_token=on_token
    )


def generate_grid(
    network: PixelNetwork,
    conditions: Conditions = UNCONDITIONED,
    *,
    generators: Sequence[torch.Generator],
    height: int,
    width: int,
    sampling: TokenSampling = DEFAULTS,
    on_token: OnToken | None = None,
) -> Tensor:
    """Sample the values (B, C, H, W) of an image for each generator, row by row and color by color.
    Arguments are those of `generate`; each generator gives H * W * C uniform numbers."""
    steps, device = partial(cached_logits, network, height=height, width=width), network.head.out.weight.device
    count = height * width * network.num_channels
    values = draw_in_order(
        steps, count, conditions, generators=generators, sampling=sampling, device=device, on_token=on_token
    )
    return rearrange(values, "b (h w c) -> b c h w", h=height, w=width).contiguous()


def draw_in_order(
    steps: Steps,
    count: int,
    conditions: Conditions,
    *,
    generators: Sequence[torch.Generator],
    sampling: TokenSampling,
    device: torch.device,
    on_token: OnToken | None = None,
) -> Tensor:
    """Draws `count` values for each generator, (B, count), each from the logits that `steps` gives for it."""
    uniforms = torch.stack([torch.rand(count, generator=g) for g in generators], dim=1).to(device)  # (N, B)
    values = torch.empty(count, len(generators), dtype=torch.int64, device=device)
    scale = sampling.guidance_scale
    with torch.inference_mode():
        for i, logits in enumerate(steps(values, 1 if scale == 1 else 2, conditions.guided(scale))):
            values[i] = draw(guided_logits(logits, scale), uniforms=uniforms[i], sampling=sampling)
            if on_token is not None:
                on_token(i + 1, count)
    return values.T.contiguous()


def draw(logits: Tensor, *, uniforms: Tensor, sampling: TokenSampling) -> Tensor:
    """Draws a token (B,) int64 for each row of `logits` (B, K) by inversion at `uniforms` (B,) in [0, 1)."""
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    # fp64, so that u * total < total for every fp32 u < 1 and a token of probability zero can never be drawn.
    cumulative = token_probabilities(logits, sampling).cumsum(dim=-1, dtype=torch.float64)  # (B, K)
    targets = uniforms.double()[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, targets, right=True)[:, 0]


def token_probabilities(logits: Tensor, sampling: TokenSampling) -> Tensor:
    """The filtered distribution (B, K) fp32 of each row of `logits` (B, K); rows sum to one."""
    logits, top_k, top_p = logits.float() / sampling.temperature, sampling.top_k, sampling.top_p
    if top_k is not None and top_k < logits.shape[-1]:
        smallest = logits.topk(top_k, dim=-1).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    probabilities = logits.softmax(dim=-1)
    if top_p is not None and top_p < 1:
        ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(dim=-1) - ordered  # mass of the tokens that come first
        ordered = ordered.masked_fill(before >= top_p, 0)
        probabilities = torch.zeros_like(ordered).scatter_(-1, order, ordered / ordered.sum(dim=-1, keepdim=True))
    return probabilities


def guided_logits(logits: Tensor, guidance_scale: float) -> Tensor:
    """Combine conditional and null logits (2B, …) into (B, …); with a scale of 1 there are no null ones."""
    if guidance_scale == 1.0:
        return logits
    conditional, unconditional = logits.chunk(2)
    return torch.lerp(unconditional, conditional, guidance_scale)


def cached_logits(
    network: Transformer | PixelNetwork, values: Tensor, copies: int, conditions: dict[str, Tensor], **size: int
) -> Iterator[Tensor]:
    """Yields the logits of each value, after the values (N, B) drawn before, by the network's cache.

    Args:
        copies: 2 where the conditions are those of a guided batch of 2B, else 1.
        size: height and width, of a network for any size."""
    start: Callable[..., tuple[Tensor, Any]] = network.start
    logits, cache = start(copies * values.shape[1], **conditions, **size)
    yield logits
    for i in range(1, len(values)):
        yield network.step(values[i - 1].repeat(copies), cache=cache)


def compiled_logits(
    transformer: Transformer, values: Tensor, copies: int, conditions: dict[str, Tensor]
) -> Iterator[Tensor]:
    """Yields logits like `cached_logits`, by a single compiled step for every position.
    On a GPU a step of a small batch takes as long as its host needs to launch some hundred kernels; there the step is a
    CUDA graph, launched as one. A graph knows its tensors by their addresses, so the last cache of a transformer is
    kept, and the next batch of its size writes over it; no other call does meanwhile. The first batch of each size
    compiles, which takes about a minute."""
    batch_size, on_gpu = copies * values.shape[1], transformer.device.type == "cuda"
    kept = KEPT.pop(transformer, None)
    kept = None if kept is None or len(kept.keys[0]) != batch_size else kept
    logits, filled = transformer.start(batch_size, **conditions, cache=kept)
    yield logits
    position = torch.tensor(filled.length, device=transformer.device)
    run = program(on_gpu, BACKEND)
    for tensor in (*filled.keys, *filled.values) if on_gpu else ():
        torch._dynamo.mark_static_address(tensor, guard=False)
    for i in range(1, len(values)):
        if on_gpu:
            torch.compiler.cudagraph_mark_step_begin()  # the logits before are no longer needed
        yield run(transformer, values[i - 1].repeat(copies), position, cache=filled)
        position.add_(1)
    KEPT[transformer] = filled


@cache
def program(on_gpu: bool, backend: str) -> Callable[..., Any]:
    """`Transformer.step_at`, compiled for each batch size; transformers of one shape share the program."""
    mode = "reduce-overhead" if on_gpu else None  # with CUDA graphs
    return torch.compile(  # pyrefly: ignore[no-matching-overload]
        Transformer.step_at, backend=backend, mode=mode, fullgraph=True, dynamic=False, recompile_limit=VARIANTS
    )


class TokenWindow(NamedTuple):
    """The place of a window, and of its next token in the window's raster order."""

    top: int
    left: int
    place: int


def window_logits(
    transformer: Transformer, grid: tuple[int, int], values: Tensor, copies: int, conditions: dict[str, Tensor]
) -> Iterator[Tensor]:
    """Yields logits like `cached_logits`, for a grid (H, W) larger than the trained one.
    Each token is drawn from the window of the trained size that has it in its middle, or nearest to it at the borders,
    given what of the window is there already (Esser et al. 2021, 3.3). While the window stands still its cache goes on;
    where it moves, what it holds is read again. A condition image is cut with the same window."""
    canvas, cache, before = values.T.unflatten(1, grid), None, None
    for number in range(len(values)):
        window = window_of(number, grid, transformer.grid)
        if cache is not None and before == window._replace(place=window.place - 1):
            logits = transformer.step(values[number - 1].repeat(copies), cache=cache)
        else:
            parts = {name: value for name, value in conditions.items() if name != "condition"}
            if "condition" in conditions:
                parts["condition"] = cut_condition(transformer, conditions["condition"], grid, window)
            drawn = cut(canvas, window, transformer.grid)[:, : window.place].repeat(copies, 1)
            logits, cache = transformer.start(len(drawn), **parts, tokens=drawn, cache=None)
        yield logits
        before = window


def window_of(number: int, grid: tuple[int, int], trained: tuple[int, int]) -> TokenWindow:
    """The window of a token by its number: the token in the middle, or the window at a border."""
    row, column = divmod(number, grid[1])
    top, left = (
        min(max(at - part // 2, 0), whole - part) for at, whole, part in zip((row, column), grid, trained, strict=True)
    )
    return TokenWindow(top, left, place=(row - top) * trained[1] + column - left)


def cut(canvas: Tensor, window: TokenWindow, size: tuple[int, int]) -> Tensor:
    """Tokens of the window, (B, H, W) -> (B, size[0] * size[1]) in raster order."""
    return canvas[:, window.top : window.top + size[0], window.left : window.left + size[1]].flatten(1)


def cut_condition(transformer: Transformer, condition: Tensor, grid: tuple[int, int], window: TokenWindow) -> Tensor:
    """The window's part (B, M) of the whole grid's condition, which is larger by the factors of the grid."""
    (height, width), (h, w) = transformer.condition_grid, transformer.grid
    whole = condition.unflatten(1, (grid[0] * height // h, grid[1] * width // w))
    return cut(whole, TokenWindow(window.top * height // h, window.left * width // w, place=0), (height, width))


def check_grid(transformer: Transformer, grid: tuple[int, int], condition: Tensor | None) -> None:
    """Raise ValueError for a condition of other proportions than a grid of at least the trained one."""
    if condition is None:
        return
    (height, width), (h, w) = grid, transformer.grid
    rows, columns = height * transformer.condition_grid[0], width * transformer.condition_grid[1]
    if rows % h or columns % w or condition.shape[1] != (rows // h) * (columns // w):
        raise ValueError(
            f"a condition of {condition.shape[1]} tokens does not fit a grid of {height}×{width}: the prior was "
            f"trained with {transformer.condition_grid[0]}×{transformer.condition_grid[1]} for {h}×{w}"
        )
