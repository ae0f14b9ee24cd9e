"""Tokens: a Parquet file for each shard of images, read whole, checked, and served by rank.

A set of images may come with a second set, the condition: tokens of other images of the same keys (depth maps,
small images), made by a tokenizer of their own.

Shapes: N samples, T tokens an image, L text_length, M tokens of a condition image, m = global batch / ranks.
"""

import io
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from components.data.listing import ShardError, TokensError
from components.data.order import permutation
from components.data.shards import Split
from components.runtime.storage.artifact import Artifact

COLUMNS = ("key", "tokens", "label", "text", "split")
HELD_OUT = 2048  # images for previews and the final evaluation


class TokenSet(NamedTuple):
    """Samples in canonical order."""

    key: tuple[str, ...]
    tokens: np.ndarray  # (N, T) int64
    label: np.ndarray  # (N,) int64
    text: np.ndarray  # (N, L) int64
    split: np.ndarray  # (N,) str


def write_tokens(samples: TokenSet) -> bytes:
    """Encodes samples as Parquet; equal samples give equal bytes."""
    columns = [
        pa.array(samples.key, pa.string()),
        _matrix(samples.tokens, pa.int32()),
        pa.array(samples.label, pa.int64()),
        _matrix(samples.text, pa.int32()),
        pa.array(samples.split.tolist(), pa.string()),
    ]
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns, names=list(COLUMNS)), buffer)
    return buffer.getvalue()


def parse_tokens(data: bytes, name: str) -> TokenSet:
    """Samples of a token shard. Raises ShardError, with `name`, for a file that is no token shard."""
    try:
        table = pq.read_table(io.BytesIO(data), columns=list(COLUMNS))
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ShardError(f"token shard {name} can't be read ({error}); delete it and run the stage again") from error
    return TokenSet(
        tuple(table["key"].to_pylist()),
        np.array(table["tokens"].to_pylist(), dtype=np.int64).reshape(table.num_rows, -1),
        table["label"].to_numpy(),
        np.array(table["text"].to_pylist(), dtype=np.int64).reshape(table.num_rows, -1),
        np.array(table["split"].to_pylist(), dtype=str),
    )


def select_split(samples: TokenSet, split: Split) -> TokenSet:
    """The samples of a split, in canonical order."""
    (chosen,) = np.nonzero(samples.split == split)
    return TokenSet(tuple(samples.key[i] for i in chosen), *(field[chosen] for field in samples[1:]))


def aligned_tokens(samples: TokenSet, other: TokenSet) -> np.ndarray:
    """Tokens (N, M) of the condition images `other`, matched by key, in the order of `samples`.
    Raises TokensError, naming an image, if images lack condition tokens."""
    places = {key: place for place, key in enumerate(other.key)}
    missing = [key for key in samples.key if key not in places]
    if missing:
        raise TokensError(
            f"{len(missing)} of {len(samples.key)} images have no condition tokens, {missing[0]} among them: "
            "make both from the same images"
        )
    return other.tokens[[places[key] for key in samples.key]]


def read_tokens(tokens: Artifact) -> TokenSet:
    """All samples of a tokens artifact, in canonical order. Raises ShardError or ArtifactError for damage."""
    parts = [parse_tokens(tokens.read(name), name) for name in tokens.metadata["names"]]
    keys = tuple(key for part in parts for key in part.key)
    return TokenSet(keys, *(np.concatenate([part[field] for part in parts]) for field in range(1, 5)))


def check_tokenizer(tokens: Artifact, *, codebook_size: int, grid: Sequence[int]) -> None:
    """Raise TokensError, in a line, if tokens are from a tokenizer with another codebook or grid."""
    metadata = tokens.metadata
    if metadata["codebook_size"] != codebook_size:
        raise TokensError(
            f"the tokens have a codebook of {metadata['codebook_size']}, the tokenizer one of {codebook_size}: make "
            "the tokens with this tokenizer"
        )
    if (own := tuple(metadata["grid"])) != tuple(grid):
        of, one = ("×".join(map(str, size)) for size in (own, grid))
        raise TokensError(
            f"the tokens have a grid of {of}, the tokenizer one of {one}: make the tokens with this tokenizer"
        )


def check_condition(condition: Artifact | None, *, wanted: bool) -> None:
    """Raise TokensError, in a line, for condition tokens that are missing, or present but not `wanted`."""
    if wanted and condition is None:
        raise TokensError("the recipe conditions on another image, but no condition tokens are given")
    if condition is not None and not wanted:
        raise TokensError("condition tokens are given, but condition is not among the recipe's conditions")


def check_aligned(tokens: Artifact, condition: Artifact) -> None:
    """Raise TokensError, in a line, if condition tokens are of other images. Reads both sets whole."""
    aligned_tokens(read_tokens(tokens), read_tokens(condition))


def rank_tokens(tokens: Artifact, condition: Artifact | None = None, **place: Any) -> Iterator[dict[str, np.ndarray]]:
    """Batches of the training split, with `condition` (m, M) if given; for `place` see `token_batches`."""
    samples = select_split(read_tokens(tokens), "train")
    rows = None if condition is None else aligned_tokens(samples, read_tokens(condition))
    return token_batches(samples, condition=rows, **place)


def held_out_tokens(tokens: Artifact, condition: Artifact | None = None) -> dict[str, np.ndarray]:
    """Columns of the first HELD_OUT held-out samples; of the whole set if none are held out."""
    samples = read_tokens(tokens)
    held_out = select_split(samples, "holdout")
    chosen = held_out if held_out.key else samples
    columns = {name: getattr(chosen, name)[:HELD_OUT] for name in ("tokens", "label", "text")}
    if condition is not None:
        columns["condition"] = aligned_tokens(chosen, read_tokens(condition))[:HELD_OUT]
    return columns


def token_batches(
    samples: TokenSet,
    *,
    condition: np.ndarray | None = None,
    global_batch_size: int,
    rank: int,
    world_size: int,
    seed: int,
    start_step: int,
    total_steps: int,
) -> Iterator[dict[str, np.ndarray]]:
    """Rank r's slices of the batches of steps [start_step, total_steps).

    Columns: `tokens` (m, T), `label` (m,), `text` (m, L), `position` (m,), all int64; and `condition` (m, M), if the
    condition tokens (N, M) of the samples are given. Position p is sample p mod N of the permutation of epoch p div N:
    each epoch serves each sample exactly once. Pass the training split.

    Raises ValueError for a batch that does not divide, or an empty set.
    """
    count, share = len(samples.key), global_batch_size // world_size
    if not count or share * world_size != global_batch_size:
        raise ValueError(f"{count} samples, global_batch_size {global_batch_size}, {world_size} workers do not fit")
    orders: dict[int, np.ndarray] = {}
    for step in range(start_step, total_steps):
        position = np.arange(step * global_batch_size + rank, (step + 1) * global_batch_size, world_size)
        epochs = {int(epoch) for epoch in position // count}
        orders = {e: orders[e] if e in orders else permutation(count, key=(seed, e)) for e in sorted(epochs)}
        chosen = np.array([orders[p // count][p % count] for p in position.tolist()])
        yield {
            "tokens": samples.tokens[chosen],
            "label": samples.label[chosen],
            "text": samples.text[chosen],
            "position": position,
            **({} if condition is None else {"condition": condition[chosen]}),
        }


def _matrix(values: np.ndarray, dtype: pa.DataType) -> pa.Array:
    width = values.shape[1]
    return pa.FixedSizeListArray.from_arrays(pa.array(values.ravel(), dtype), width)
