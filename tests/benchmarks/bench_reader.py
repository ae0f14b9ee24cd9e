"""The reader against webdataset's own WebLoader: the same tars, as many threads as it has processes, whole images
into the loop. Time runs between two batches in the middle of a stream, when all that was read ahead is used up: a
training's stream is started once, and waits for the loop ever after.

Two sets of the same real images: one that a reading process keeps decoded, and one that it decodes in each epoch.
"""

import gc
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice

import numpy as np
import webdataset as wds

from components.data.decoded import ImageSamples
from components.data.ingest import IngestConfig, ingest
from components.data.shards import ShardIndex, View
from components.data.stream import rank_batches
from components.runtime.storage.store import Store
from tests.benchmarks.interleaving import Row, cpu_of_tree, own_ray, row

BATCH = 64
READERS = (os.cpu_count() or 1) + 1  # processes of the peer, threads of ours
WARM_UP = 600  # batches; more than either reader keeps ahead
Read = Callable[[], Iterator[np.ndarray]]


def rows(rounds: int) -> list[Row]:
    """Seconds for as many images, of OpenMoji with 42 MB decoded and with 167, more than a reading process keeps."""
    found = []
    with own_ray(), tempfile.TemporaryDirectory() as folder:
        for name, resolution, steps in (("reader", 64, 400), ("reader_decoding", 128, 300)):
            shards = {"samples_per_shard": 512, "holdout_fraction": 0, "vocab_size": 1024, "text_length": 16}
            config, out = IngestConfig(resolution=resolution, **shards), Store(f"{folder}/{resolution}")
            index = ingest("openmoji", out=out, config=config, num_cpus=4)
            whole = WARM_UP + steps + WARM_UP
            peer = partial(web_loader, [index.url(shard.url) for shard in index.shards], whole)
            found.append(compared(name, partial(ours, index, whole), peer, steps, WARM_UP, rounds))
    return found


def compared(name: str, mine: Read, theirs: Read, steps: int, warm_up: int, rounds: int) -> Row:
    """Both readers in turn, round by round, between two batches in the middle of a stream."""
    times = [[drain(read(), steps, warm_up=warm_up) for read in (mine, theirs)] for _ in range(rounds)]
    (seconds, cpu), (peer_seconds, peer_cpu) = np.median(times, axis=0).tolist()
    return row(name, seconds, peer_seconds, f"s / {steps * BATCH} images", cpu_ours=cpu, cpu_peer=peer_cpu)


def ours(index: ShardIndex, steps: int) -> Iterator[np.ndarray]:
    samples = ImageSamples(index, View(int(index.resolution or 0)))
    how = {"global_batch_size": BATCH, "seed": 0, "streams": 12, "threads": READERS}
    for batch in rank_batches(samples, total_steps=steps, **how):
        yield batch["image"]


def web_loader(urls: list[str], steps: int, *, buffer: int = 1000) -> Iterator[np.ndarray]:
    """Its usual pipeline: shards drawn at random, a buffer of samples shuffled, decoded and batched in the workers."""
    dataset = (
        wds.WebDataset(urls, shardshuffle=False, resampled=True, nodesplitter=wds.shardlists.single_node_only)
        .shuffle(buffer)
        .decode("rgb8")
        .to_tuple("png;jpg", "cls")
        .batched(BATCH)
    )
    loader = wds.WebLoader(dataset, num_workers=READERS, batch_size=None)
    # Its workers are forked: one that collected a handle of Ray's would wait for ever for a thread that it lacks.
    gc.collect()
    gc.freeze()
    try:
        for image, _ in islice(loader, steps):
            yield np.asarray(image)
    finally:
        gc.unfreeze()


def drain(batches: Iterator[np.ndarray], steps: int, *, warm_up: int) -> tuple[float, float]:
    """Seconds and CPU seconds, of this process and its children, of the `steps` batches after the first `warm_up`.

    Batches that follow are read too, and not measured: as a stream ends, one reading process after the other has no
    work left; and one that is given up works on next to the next.
    """
    for _ in range(warm_up):
        assert next(batches).shape[0] == BATCH
    start, cpu_start = time.perf_counter(), cpu_of_tree()
    assert sum(batch.shape[0] for batch in islice(batches, steps)) == steps * BATCH
    seconds, cpu_seconds = time.perf_counter() - start, cpu_of_tree() - cpu_start
    for _ in batches:
        pass
    return seconds, cpu_seconds
