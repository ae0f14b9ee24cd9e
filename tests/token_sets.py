"""Sets of tokens whose contents say which sample they are of."""

from collections.abc import Sequence

import numpy as np

from components.data.tokens import TokenSet, describe_tokens, write_tokens
from components.runtime.storage.artifact import Artifact, commit_artifact, describe
from components.runtime.storage.store import Store

GRID, TEXT_LENGTH = (2, 2), 5


def token_set(first: int, count: int, *, width: int = 4, shift: int = 0) -> TokenSet:
    """Samples from `first` on, all of whose tokens are their number plus `shift`; every tenth is held out."""
    numbers = np.arange(first, first + count)
    return TokenSet(
        tuple(f"{number:04d}" for number in numbers),
        np.tile(shift + numbers[:, None], (1, width)).astype(np.int32),
        numbers % 3,
        np.tile(numbers[:, None], (1, TEXT_LENGTH)).astype(np.int32),
        np.array(["holdout" if number % 10 == 0 else "train" for number in numbers]),
    )


def write_token_set(store: Store, files: Sequence[TokenSet], *, grid: tuple[int, int] = GRID) -> Artifact:
    """A committed artifact of one file for each part."""
    names = [f"{number:06d}-a.parquet" for number in range(len(files))]
    entries = []
    for name, samples in zip(names, files, strict=True):
        store.write(f"files/{name}", data := write_tokens(samples))
        entries.append(describe(data, f"files/{name}"))
    shards = [describe_tokens(samples, name).model_dump() for name, samples in zip(names, files, strict=True)]
    text = {"vocab_size": 512, "text_length": TEXT_LENGTH}
    metadata = {"shards": shards, "grid": list(grid), "codebook_size": 512, "text": text}
    own = Artifact(kind="tokens", stage="tokens", key="k", files=tuple(entries), metadata=metadata)
    return commit_artifact(store, own)


def numbered_sets(*counts: int, **how: int) -> list[TokenSet]:
    """Files of so many samples, numbered through."""
    firsts = np.cumsum([0, *counts[:-1]])
    return [token_set(int(first), count, **how) for first, count in zip(firsts, counts, strict=True)]
