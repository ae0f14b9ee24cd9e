"""The reader on 64 x 64 and 512 x 512 JPEGs from a folder and from an S3 server, with every shard's sha256 looked at,
against webdataset's WebLoader, which looks at none, and against bare decoding: the same number of processes that have
the files in memory and hand the images to nobody, by Pillow, as WebLoader decodes (`_bare`), and by what the reader
itself decodes with (`_bare_own`).
"""

import io
import re
import tempfile
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import numpy as np
import psutil
from PIL import Image

from components.data.decoded import ImageSamples
from components.data.images import load_image
from components.data.ingest import IngestConfig, ingest
from components.data.shards import ShardIndex, View, read_shard
from components.data.stream import Layout, RankReader, Share
from components.runtime.storage.store import Store
from tests.benchmarks.bench_reader import BATCH, READERS, Read, compared, ours, web_loader
from tests.benchmarks.interleaving import Row, own_ray, row
from tests.benchmarks.photos import peak_megabytes, upload, write_photos
from tests.emulators import s3_server

SETS = {64: (8, 1024), 512: (6, 128)}  # resolution -> (shards, samples of each)
STEPS, WARM_UP = {64: 200, 512: 64}, {64: 600, 512: 32}  # batches; nobody keeps more than WARM_UP of them ahead
BUFFER = {64: 1000, 512: 64}  # samples that the peer shuffles
Decode = Callable[[bytes], np.ndarray]


def rows(rounds: int) -> list[Row]:
    found: list[Row] = []
    with tempfile.TemporaryDirectory() as folder, s3_server() as settings, own_ray():
        address = settings["AWS_ENDPOINT_URL"]
        for resolution, (shards, samples) in SETS.items():
            place = Path(folder) / str(resolution)
            write_photos(place, resolution=resolution, shards=shards, samples=samples)
            upload(place, address, f"photos-{resolution}")
            index = make_index(str(place), f"{folder}/local-{resolution}", resolution)
            remote = make_index(f"s3://photos-{resolution}", f"{folder}/s3-{resolution}", resolution)
            found += rows_of(index, remote, resolution, address, rounds)
    return found


def rows_of(index: ShardIndex, remote: ShardIndex, resolution: int, address: str, rounds: int) -> list[Row]:
    steps, warm_up = STEPS[resolution], WARM_UP[resolution]
    whole, unit = warm_up + steps + warm_up, f"s / {steps * BATCH} images"
    local_urls = [index.url(shard.url) for shard in index.shards]
    web_urls = [shard.url.replace("s3://", f"{address}/") for shard in remote.shards]
    loader = partial(web_loader, steps=whole, buffer=BUFFER[resolution])
    found = [
        compared(
            f"reader_{resolution}_{where}", partial(ours, of, whole), partial(loader, urls), steps, warm_up, rounds
        )
        for where, of, urls in (("local", index, local_urls), ("s3", remote, web_urls))
    ]
    for name, decode in (("bare", by_pillow), ("bare_own", partial(load_image, resolution=resolution))):
        bare = median(bare_seconds(index, decode, steps * BATCH) for _ in range(rounds))
        found += [row(f"{one['name']}_{name}", one["ours"], bare, unit) for one in found[:2]]
    first = [first_batch(partial(ours, index, 1)), first_batch(partial(loader, local_urls))]
    found.append(row(f"first_batch_{resolution}", *first, "s to the first batch"))
    found.append(memory(partial(ours, index, steps), partial(loader, local_urls), resolution))
    epochs = epoch_seconds(index, resolution)
    found.append(row(f"second_epoch_{resolution}", *epochs, "s / epoch of one reader, second and first"))
    return found


def make_index(source: str, out: str, resolution: int) -> ShardIndex:
    config = IngestConfig(
        resolution=resolution, samples_per_shard=128, holdout_fraction=0, vocab_size=300, text_length=16
    )
    index = ingest("webdataset", source, out=Store(out), config=config)
    return index.model_copy(update={"resolution": resolution})


def bare_seconds(index: ShardIndex, decode: Decode, images: int) -> float:
    """READERS processes decode images that they hold in memory."""
    files = [sample.image for sample in read_shard(index, index.shards[0])]
    with ProcessPoolExecutor(READERS, mp_context=get_context("forkserver")) as pool:
        list(pool.map(decode_all, [decode] * READERS, [files] * READERS, [2] * READERS))
        start = time.perf_counter()
        list(pool.map(decode_all, [decode] * READERS, [files] * READERS, [images // READERS] * READERS))
        return time.perf_counter() - start


def decode_all(decode: Decode, files: list[bytes], images: int) -> int:
    return sum(int(decode(files[number % len(files)])[0, 0, 0]) for number in range(images))


def by_pillow(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def first_batch(read: Read) -> float:
    start = time.perf_counter()
    next(read())
    return time.perf_counter() - start


def memory(mine: Read, theirs: Read, resolution: int) -> Row:
    """Private memory of the largest process that reads; images on their way lie in shared memory on both sides."""
    own_title = re.escape(" ".join(psutil.Process().cmdline()))  # of the peer's forks
    peaks = (
        peak_megabytes(lambda read=read: deque(islice(read(), STEPS[resolution]), maxlen=0), name=name)
        for read, name in ((mine, r"ray::MapWorker"), (theirs, own_title))
    )
    return row(f"memory_{resolution}", *peaks, "MB of one reading process")


def epoch_seconds(index: ShardIndex, resolution: int) -> tuple[float, float]:
    """(second, first) epoch of a reader in this process: read, verified, decoded, put in order."""
    samples, seconds = ImageSamples(index, View(resolution)), []
    steps = index.train_samples // BATCH
    share = Share(BATCH, 0, 12, 2 * steps)
    layout = Layout.of(samples, share)
    reader = RankReader(samples, share, layout=layout, threads=1)
    for epoch in (0, 1):
        start = time.perf_counter()
        for step in range(epoch * steps, (epoch + 1) * steps, layout.block_steps):
            reader.rows(step, min(step + layout.block_steps, (epoch + 1) * steps))
        seconds.append(time.perf_counter() - start)
    return seconds[1], seconds[0]
