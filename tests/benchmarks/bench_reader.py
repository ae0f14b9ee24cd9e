"""The reader against webdataset's own WebLoader: the same tars, the same number of reading processes, whole images
into the loop. Time runs between two batches in the middle of a stream, when all that was read ahead is used up: a
training's stream is started once, and waits for the loop ever after.

Two sets of the same real images: one that a reading process keeps decoded, and one that it decodes in each epoch.
"""

import gc
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from statistics import median

import numpy as np
import psutil
import ray
import webdataset as wds

from components.data.crews import split_stream
from components.data.ingest import IngestConfig, ingest
from components.data.shards import ShardIndex
from components.data.stream import rank_batches, training_stream
from components.runtime.storage.store import Store
from pipelines.engine.session import start_ray

BATCH = 64
READERS = (os.cpu_count() or 1) + 1  # one works while another waits for its next task
WARM_UP = 600  # batches; more than either reader keeps ahead


def rows(rounds: int) -> list[dict[str, object]]:
    """One row for each set; seconds for the same number of images."""
    start_ray(worker_start_timeout=120, verbose=False)
    try:
        with tempfile.TemporaryDirectory() as folder:
            return [
                measure("reader", make_set(folder, 64), steps=400, rounds=rounds),
                measure("reader_decoding", make_set(folder, 128), steps=300, rounds=rounds),
            ]
    finally:
        ray.shutdown()


def make_set(folder: str, resolution: int) -> ShardIndex:
    """OpenMoji at a resolution; 64: 42 MB decoded, 128: 167 MB, more than a reading process keeps."""
    config = IngestConfig(
        resolution=resolution, samples_per_shard=512, holdout_fraction=0, vocab_size=1024, text_length=16
    )
    return ingest("openmoji", out=Store(str(Path(folder) / str(resolution))), config=config, num_cpus=4)


def measure(name: str, index: ShardIndex, *, steps: int, rounds: int) -> dict[str, object]:
    """Both readers in turn, round by round."""
    times: dict[str, list[float]] = {"ours": [], "peer": []}
    cpu: dict[str, list[float]] = {"ours": [], "peer": []}
    readers: dict[str, Callable[[ShardIndex, int], Iterator[np.ndarray]]] = {"ours": ours, "peer": peer}
    for _ in range(rounds):
        for side, read in readers.items():
            seconds, cpu_seconds = drain(read(index, WARM_UP + steps + WARM_UP), steps)
            times[side].append(seconds)
            cpu[side].append(cpu_seconds)
    best = {side: median(values) for side, values in times.items()}
    return {
        "name": name,
        "ours": best["ours"],
        "peer": best["peer"],
        "ratio": median(a / b for a, b in zip(times["ours"], times["peer"], strict=True)),
        "unit": f"s / {steps * BATCH} images",
        "cpu_ours": median(cpu["ours"]),
        "cpu_peer": median(cpu["peer"]),
    }


def ours(index: ShardIndex, steps: int) -> Iterator[np.ndarray]:
    dataset = training_stream(
        index,
        resolution=int(index.resolution or 0),
        global_batch_size=BATCH,
        world_size=1,
        seed=0,
        start_step=0,
        total_steps=steps,
        readers=READERS,
    )
    (iterator,) = split_stream(dataset, world_size=1)
    for batch in rank_batches(iterator, batch_size=BATCH, steps=steps):
        yield batch["image"]


def peer(index: ShardIndex, steps: int) -> Iterator[np.ndarray]:
    """Its usual pipeline: shards drawn at random, a buffer of samples shuffled, decoded and batched in the workers."""
    yield from web_loader([index.url(shard.url) for shard in index.shards], steps)


def web_loader(urls: list[str], steps: int, *, buffer: int = 1000) -> Iterator[np.ndarray]:
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


def drain(batches: Iterator[np.ndarray], steps: int, *, warm_up: int = WARM_UP) -> tuple[float, float]:
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


def cpu_of_tree() -> float:
    total = 0.0
    me = psutil.Process()
    for process in [me, *me.children(recursive=True)]:
        try:
            total += sum(process.cpu_times()[:4])
        except psutil.NoSuchProcess:
            continue
    return total


if __name__ == "__main__":
    for row in rows(1):
        print(row)
