"""Tokens: a Parquet file for each shard of images, checked, and read as shards of the training stream.

A set of images may come with a second set, the condition: tokens of the same images' depth maps or smaller sizes, made
by a tokenizer of their own. A file is read whole, so that its sha256 holds for all that is read.

Shapes: n samples, T tokens an image, L text_length, M tokens of a condition image.
"""

import hashlib
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from components.configuration.config import Config
from components.data.listing import ShardError, TokensError
from components.data.shards import Split
from components.runtime.storage.artifact import Artifact

HELD_OUT = 2048  # images for previews and the final evaluation


class TokenSet(NamedTuple):
    """Samples of a file, in the order of the shard."""

    key: tuple[str, ...]
    tokens: np.ndarray  # (n, T) int32
    label: np.ndarray  # (n,) int64
    text: np.ndarray  # (n, L) int32
    split: np.ndarray  # (n,) str


class TokenFile(Config):
    """A file of tokens in the artifact's metadata."""

    name: str
    samples: int
    train_samples: int
    keys: str  # sha256 of the samples' keys, in order


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
    pq.write_table(pa.table(columns, names=TokenSet._fields), buffer)
    return buffer.getvalue()


def parse_tokens(data: bytes, name: str) -> TokenSet:
    """Samples of a token file. Raises ShardError, with `name`, for a file that is none."""
    try:
        table = pq.read_table(io.BytesIO(data), columns=list(TokenSet._fields), use_threads=False)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ShardError(f"token file {name} can't be read ({error}); delete it and run the stage again") from error
    lists = (table[column].combine_chunks() for column in ("tokens", "text"))
    tokens, text = (each.flatten().to_numpy().reshape(-1, each.type.list_size) for each in lists)
    split = np.array(table["split"].to_pylist(), dtype=str)
    return TokenSet(tuple(table["key"].to_pylist()), tokens, table["label"].to_numpy(), text, split)


def describe_tokens(samples: TokenSet, name: str) -> TokenFile:
    """Counts and keys of a file, for the artifact."""
    keys = hashlib.sha256("\n".join(samples.key).encode()).hexdigest()
    trained = int((samples.split == "train").sum())
    return TokenFile(name=name, samples=len(samples.key), train_samples=trained, keys=keys)


def token_files(tokens: Artifact) -> list[TokenFile]:
    """Files of a tokens artifact, in the order of the set."""
    return [TokenFile.model_validate(file) for file in tokens.metadata["shards"]]


def check_tokenizer(tokens: Artifact, *, codebook_size: int, grid: Sequence[int]) -> None:
    """Raise TokensError, in a line, if tokens are from a tokenizer with another codebook or grid."""
    of, one = ("×".join(map(str, size)) for size in (tokens.metadata["grid"], grid))
    for what, own, wanted in (("codebook", tokens.metadata["codebook_size"], codebook_size), ("grid", of, one)):
        if own != wanted:
            remedy = "make the tokens with this tokenizer"
            raise TokensError(f"the tokens have a {what} of {own}, the tokenizer one of {wanted}: {remedy}")


def check_condition(tokens: Artifact, condition: Artifact | None, *, wanted: bool) -> None:
    """Raise TokensError, in a line, for condition tokens that do not fit; reads no file.
    They are missing, present but not `wanted`, or of other images."""
    if wanted and condition is None:
        raise TokensError("the recipe conditions on another image, but no condition tokens are given")
    if condition is None:
        return
    if not wanted:
        raise TokensError("condition tokens are given, but condition is not among the recipe's conditions")
    ours, theirs, remedy = token_files(tokens), token_files(condition), "make both from the same images"
    for own, their in zip(ours, theirs, strict=False):
        if own.keys != their.keys:
            raise TokensError(f"the condition tokens of {own.name} are of other images: {remedy}")
    if len(ours) != len(theirs):
        raise TokensError(f"{len(ours)} files of tokens, {len(theirs)} of condition tokens: {remedy}")


class TokenShard:
    """The samples of a split of a file, in memory; (n, ...) by column."""

    def __init__(self, columns: dict[str, np.ndarray]) -> None:
        self.columns = columns
        self.nbytes = sum(column.nbytes for column in columns.values())

    def fill(self, rows: dict[str, np.ndarray], where: np.ndarray, ordinals: np.ndarray) -> None:
        for name, column in self.columns.items():
            rows[name][where] = column[ordinals]


@dataclass
class TokenSamples:
    """The training samples of a set of tokens, for the training stream. Columns, all int64:
    `tokens` (n, T), `label` (n,), `text` (n, L), `position` (n,); with condition tokens also `condition` (n, M)."""

    decoded: ClassVar[bool] = True

    tokens: Artifact
    condition: Artifact | None = None

    @property
    def counts(self) -> np.ndarray:  # int64 (S,)
        return np.array([file.train_samples for file in token_files(self.tokens)], dtype=np.int64)

    def empty(self, rows: int) -> dict[str, np.ndarray]:
        widths = {"tokens": math.prod(self.tokens.metadata["grid"])}
        widths["text"] = self.tokens.metadata["text"]["text_length"]
        if self.condition is not None:
            widths["condition"] = math.prod(self.condition.metadata["grid"])
        columns = {name: np.zeros((rows, width), np.int64) for name, width in widths.items()}
        return columns | {name: np.zeros(rows, np.int64) for name in ("label", "position")}

    def open(self, shard: int) -> TokenShard:
        """The training samples of a file. Raises ShardError or ArtifactError for damage."""
        return read_split(self.tokens, self.condition, number=shard, split="train")

    def complete(self, rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return rows


def read_split(tokens: Artifact, condition: Artifact | None, *, number: int, split: Split) -> TokenShard:
    """The samples of a split of the file `number`. Raises ShardError or ArtifactError for damage."""
    samples = read_tokens(tokens, number)
    chosen = samples.split == split
    columns = {name: getattr(samples, name)[chosen] for name in ("tokens", "label", "text")}
    if condition is not None:
        columns["condition"] = read_tokens(condition, number).tokens[chosen]
    return TokenShard(columns)


def read_tokens(tokens: Artifact, number: int) -> TokenSet:
    """The samples of the file `number` of a set. Raises ShardError or ArtifactError for damage."""
    name = tokens.metadata["shards"][number]["name"]
    return parse_tokens(tokens.read(name), name)


def held_out_tokens(tokens: Artifact, condition: Artifact | None = None) -> dict[str, np.ndarray]:
    """Columns of the first HELD_OUT held-out samples; of training samples if none are held out."""
    files = token_files(tokens)
    split: Split = "holdout" if any(file.samples > file.train_samples for file in files) else "train"
    shards, left = list[TokenShard](), HELD_OUT
    for number, file in enumerate(files):
        count = file.train_samples if split == "train" else file.samples - file.train_samples
        if count and left > 0:
            shards.append(read_split(tokens, condition, number=number, split=split))
            left -= count
    columns = {name: np.concatenate([shard.columns[name] for shard in shards]) for name in shards[0].columns}
    return {name: column[:HELD_OUT].astype(np.int64) for name, column in columns.items()}


def _matrix(values: np.ndarray, dtype: pa.DataType) -> pa.Array:
    width = values.shape[1]
    return pa.FixedSizeListArray.from_arrays(pa.array(values.ravel(), dtype), width)
