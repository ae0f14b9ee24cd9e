"""Draw images larger than the grid of the prior's training (Esser et al. 2021, 3.3).

Each token is drawn from the window of the trained size that has it in its middle, or nearest to it at the borders,
given what of the window is there already. Class and text stay; a condition image is cut with the same window.

Shapes: B images, H W their grid, h w the trained grid, M condition tokens of a window, M' of the whole grid.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from components.models.transformer import Transformer
from components.sampling.autoregressive import OnToken, check_filters, draw, guided_logits, with_null, without_none


class TokenWindow(NamedTuple):
    """The place of a window, and of its next token in the window's raster order."""

    top: int
    left: int
    place: int


def generate_window(
    transformer: Transformer,
    *,
    grid: tuple[int, int],
    generators: Sequence[torch.Generator],
    label: Tensor | None = None,
    text: Tensor | None = None,
    condition: Tensor | None = None,
    null_text: Tensor | None = None,
    guidance_scale: float = 1.0,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    on_token: OnToken | None = None,
) -> Tensor:
    """Sample a token grid for each generator; on the trained grid equal to `generate`.

    On the trained grid the tokens are those of `generate`, token for token. While the window stands still its cache
    goes on; where it moves, what it holds is read again.

    Args:
        grid: (H, W) in tokens, nowhere smaller than `transformer.grid`.
        generators: each gives H * W uniform numbers.
        condition: (B, M') int64, the condition image of the whole grid in raster order, larger than the trained one
            by the same factors as the grid.
        on_token: called with (tokens done, H * W).
        label, text, null_text, guidance_scale, temperature, top_k, top_p: see `generate`.

    Returns:
        (B, H * W) int64 in [0, K), on the transformer's device.

    Raises:
        ValueError: as `generate`, or when the grid is too small or the condition does not fit it.
    """
    check_filters(temperature=temperature, top_k=top_k, top_p=top_p)
    check_grid(transformer, grid, condition)
    device, copies, num_tokens = transformer.device, 1 if guidance_scale == 1.0 else 2, grid[0] * grid[1]
    uniforms = torch.stack([torch.rand(num_tokens, generator=g) for g in generators], dim=1).to(device)  # (HW, B)
    canvas = torch.zeros(len(generators), *grid, dtype=torch.int64, device=device)
    token, cache, before = torch.empty(0), None, None
    with torch.inference_mode():
        for number in range(num_tokens):
            window = window_of(number, grid, transformer.grid)
            if cache is not None and before == window._replace(place=window.place - 1):
                logits = transformer.step(token.repeat(copies), cache=cache)
            else:
                part = cut_condition(transformer, condition, grid, window)
                conditions = without_none(label=label, text=text, condition=part)
                if copies == 2:
                    conditions = with_null(transformer, conditions, null_text=null_text)
                drawn = cut(canvas, window, transformer.grid)[:, : window.place].repeat(copies, 1)
                logits, cache = transformer.start(len(drawn), **conditions, tokens=drawn, cache=None)
            logits = guided_logits(logits, guidance_scale)
            token = draw(logits, uniforms=uniforms[number], temperature=temperature, top_k=top_k, top_p=top_p)
            canvas[:, number // grid[1], number % grid[1]] = token
            before = window
            if on_token is not None:
                on_token(number + 1, num_tokens)
    return canvas.flatten(1)


def window_of(number: int, grid: tuple[int, int], trained: tuple[int, int]) -> TokenWindow:
    """The window of a token by its number in raster order.

    The token stands in the middle, at half of the rows and columns, unless the window would leave the grid.
    """
    row, column = divmod(number, grid[1])
    top, left = (
        min(max(at - part // 2, 0), whole - part) for at, whole, part in zip((row, column), grid, trained, strict=True)
    )
    return TokenWindow(top, left, place=(row - top) * trained[1] + column - left)


def cut(canvas: Tensor, window: TokenWindow, size: tuple[int, int]) -> Tensor:
    """Tokens of the window, (B, H, W) -> (B, size[0] * size[1]) in raster order."""
    return canvas[:, window.top : window.top + size[0], window.left : window.left + size[1]].flatten(1)


def cut_condition(
    transformer: Transformer, condition: Tensor | None, grid: tuple[int, int], window: TokenWindow
) -> Tensor | None:
    """The window's part (B, M) of the whole grid's condition (B, M')."""
    if condition is None:
        return None
    height, width = transformer.condition_grid
    whole = [grid[0] * height // transformer.grid[0], grid[1] * width // transformer.grid[1]]
    top, left = window.top * height // transformer.grid[0], window.left * width // transformer.grid[1]
    return cut(condition.unflatten(1, whole), TokenWindow(top, left, place=0), (height, width))


def check_grid(transformer: Transformer, grid: tuple[int, int], condition: Tensor | None) -> None:
    """Raise ValueError, in one line, for a grid that windows of the trained size can't cover.

    The condition must have the grid's proportions.
    """
    (height, width), (h, w) = grid, transformer.grid
    if height < h or width < w:
        raise ValueError(f"a grid of {height}×{width} is smaller than the {h}×{w} that the prior was trained on")
    if condition is None:
        return
    rows, columns = height * transformer.condition_grid[0], width * transformer.condition_grid[1]
    if rows % h or columns % w or condition.shape[1] != (rows // h) * (columns // w):
        raise ValueError(
            f"a condition of {condition.shape[1]} tokens does not fit a grid of {height}×{width}: the prior was "
            f"trained with {transformer.condition_grid[0]}×{transformer.condition_grid[1]} for {h}×{w}"
        )
