"""Tokens artifacts at work: read whole, held against what they are used with, and served by rank.

A set of images may come with a second one, the condition: tokens of other images of the same keys (depth maps,
small images), made by a tokenizer of their own.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from components.data.errors import TokensError
from components.data.tokens import TokenSet, aligned_tokens, join_tokens, parse_tokens, select_split, token_batches
from components.runtime.storage.artifact import Artifact

HELD_OUT = 2048  # images for previews and the final evaluation


def read_tokens(tokens: Artifact) -> TokenSet:
    return join_tokens([parse_tokens(tokens.read(name), name) for name in tokens.metadata["names"]])


def check_tokenizer(tokens: Artifact, *, codebook_size: int, grid: Sequence[int]) -> None:
    """Raise TokensError, in one line, if tokens are not those of a tokenizer with this codebook and grid."""
    metadata = tokens.metadata
    if metadata["codebook_size"] != codebook_size:
        raise TokensError(
            f"the tokens have a codebook of {metadata['codebook_size']}, the tokenizer one of {codebook_size}: make "
            "the tokens with this tokenizer"
        )
    (height, width), (h, w) = metadata["grid"], grid
    if (height, width) != (h, w):
        raise TokensError(
            f"the tokens have a grid of {height}×{width}, the tokenizer one of {h}×{w}: make the tokens with this "
            "tokenizer"
        )


def check_condition(condition: Artifact | None, *, wanted: bool) -> None:
    """Raise TokensError, in one line, if condition tokens are missing or not asked for."""
    if wanted and condition is None:
        raise TokensError("the recipe conditions on another image, but no condition tokens are given")
    if condition is not None and not wanted:
        raise TokensError("condition tokens are given, but condition is not among the recipe's conditions")


def check_aligned(tokens: Artifact, condition: Artifact) -> None:
    """Raise TokensError, in one line, if condition tokens are of other images. Reads both sets whole."""
    aligned_tokens(read_tokens(tokens), read_tokens(condition))


def rank_tokens(tokens: Artifact, condition: Artifact | None = None, **place: Any) -> Iterator[dict[str, np.ndarray]]:
    """Batches of the training split, see `token_batches` for `place`; with `condition` (m, M) where that is given."""
    samples = select_split(read_tokens(tokens), "train")
    rows = None if condition is None else aligned_tokens(samples, read_tokens(condition))
    return token_batches(samples, condition=rows, **place)


def held_out_tokens(tokens: Artifact, condition: Artifact | None = None) -> dict[str, np.ndarray]:
    """The held-out split; the first images of the whole set if there is none."""
    samples = read_tokens(tokens)
    held_out = select_split(samples, "holdout")
    chosen = held_out if held_out.key else samples
    columns = {name: getattr(chosen, name)[:HELD_OUT] for name in ("tokens", "label", "text")}
    if condition is not None:
        columns["condition"] = aligned_tokens(chosen, read_tokens(condition))[:HELD_OUT]
    return columns
