"""Readers of a stream, without Ray: each takes its turn at the chunks and holds what a reading process holds."""

from unittest import mock

import numpy as np

from components.data.decoded import CACHE_BYTES, ShardCache
from components.data.read_amplification import epoch_chunks
from components.data.shards import ShardIndex
from components.data.stream import Layout, read_chunk


def read_epoch(index: ShardIndex, layout: Layout, *, readers: int, capacity: int = CACHE_BYTES) -> np.ndarray:
    """Read the chunks of an epoch; one reader after the other, for what one holds is nothing to another.

    Returns the positions that were read, sorted.
    """
    header, chunks, positions = index.model_copy(update={"shards": ()}), epoch_chunks(index, layout), []
    for reader in range(readers):
        with mock.patch("components.data.stream.shard_cache", return_value=ShardCache(capacity)):
            for chunk in chunks[reader::readers]:
                positions += [np.asarray(block["position"]) for block in read_chunk(header, layout, chunk)]
    return np.sort(np.concatenate(positions))
