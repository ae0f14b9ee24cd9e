"""Token shards: one Parquet file for each shard of images, held in memory and served by the same law of order.

Shapes: N samples, T tokens an image, L text_length, M tokens of a condition image, m = global batch / ranks.
"""

import io
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from components.data.errors import ShardError, TokensError
from components.data.order import permutation
from components.data.shards import Split

COLUMNS = ("key", "tokens", "label", "text", "split")


class TokenSet(NamedTuple):
    """Samples in canonical order."""

    key: tuple[str, ...]
    tokens: np.ndarray  # (N, T) int64
    label: np.ndarray  # (N,) int64
    text: np.ndarray  # (N, L) int64
    split: np.ndarray  # (N,) str


def token_name(shard_url: str) -> str:
    """Name of the token shard made from a shard of images: one input, one output."""
    return f"{shard_url.rpartition('/')[2].partition('.')[0]}.parquet"


def write_tokens(samples: TokenSet) -> bytes:
    """Parquet bytes of samples; equal samples give equal bytes."""
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
    """Samples of one token shard. Raises ShardError, naming it, if it is not one."""
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


def join_tokens(parts: Sequence[TokenSet]) -> TokenSet:
    """Several token shards as one set, in the order given: that of the index of images."""
    keys = tuple(key for part in parts for key in part.key)
    return TokenSet(keys, *(np.concatenate([part[field] for part in parts]) for field in range(1, 5)))


def select_split(samples: TokenSet, split: Split) -> TokenSet:
    """The samples of one split, in canonical order."""
    (chosen,) = np.nonzero(samples.split == split)
    return TokenSet(tuple(samples.key[i] for i in chosen), *(field[chosen] for field in samples[1:]))


def aligned_tokens(samples: TokenSet, other: TokenSet) -> np.ndarray:
    """Tokens (N, M) of the condition images `other`, in the order of `samples`, image by image of the same key.

    Raises TokensError, naming one, if an image has none.
    """
    places = {key: place for place, key in enumerate(other.key)}
    missing = [key for key in samples.key if key not in places]
    if missing:
        raise TokensError(
            f"{len(missing)} of {len(samples.key)} images have no condition tokens, {missing[0]} among them: "
            "make both from the same images"
        )
    return other.tokens[[places[key] for key in samples.key]]


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
    """Rank r's slices of the batches of steps [start_step, total_steps): `tokens` (m, T), `label` (m,), `text` (m, L),
    `position` (m,), all int64; and `condition` (m, M), where that (N, M) of the samples is given.

    Position p is sample p mod N of the permutation of epoch p div N: each epoch serves each sample exactly once.
    Pass the training split. Raises ValueError for a batch that does not divide or an empty set.
    """
    count, share = len(samples.key), global_batch_size // world_size
    if not count or share * world_size != global_batch_size:
        raise ValueError(f"{count} samples, global_batch_size {global_batch_size}, {world_size} workers do not fit")
    orders: dict[int, np.ndarray] = {}
    for step in range(start_step, total_steps):
        first = step * global_batch_size + rank * share
        position = np.arange(first, first + share)
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
