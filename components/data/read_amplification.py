"""Read amplification: bytes fetched by readers for each byte of a set.

Readers fetch whole shards, as often as `stream.py` cuts their windows into chunks for different readers. The count
plans the chunks of an epoch and follows the shards that each reader would hold; no byte is read. Reader i mod R is
assumed to read chunk i, as is the case while all readers are equally fast. The index of tars without one is estimated
from their listing and the first bytes of a single tar.
"""

import io
import tarfile
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from itertools import islice
from typing import NamedTuple

from components.data.decoded import CACHE_BYTES
from components.data.listing import FileVersion
from components.data.order import WINDOW_SHARDS
from components.data.shards import ShardEntry, ShardIndex, TextInfo
from components.data.sources.webdataset import LICENSE
from components.data.stream import Chunk, Layout, plan_chunks
from components.data.tars import GZIP, IMAGE_SUFFIXES
from components.runtime.storage.store import read_range

MOST_CHUNKS = 2000  # planned chunks of an epoch: of ten million images at 64², of a million at 256²
SIZES = (2048, 1024, 512, 256, 128, 64, 32, 16, 8)  # samples of a shard, candidates for a recommendation
GOOD = 1.25  # bytes read for each byte of the set, at most, with a recommended size


HEAD_BYTES = 8 * 2**20  # bytes to read of the first tar


class Reads(NamedTuple):
    """Bytes fetched and bytes used."""

    fetched: int  # bytes
    served: float  # bytes of the set, by its mean sample

    @property
    def amplification(self) -> float:
        """Bytes read for each byte of the set."""
        return self.fetched / self.served


class PlannedReader:
    """The shards held by a reading process: `ShardCache`, simulated by sizes alone."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity  # bytes
        self.held: OrderedDict[str, int] = OrderedDict()  # url -> bytes, the shard used last at the end
        self.fetched = 0

    def read(self, window: Sequence[tuple[ShardEntry, int]]) -> None:
        """Count the bytes fetched for a window's shards, each with the bytes that it takes in memory."""
        needed = {entry.url for entry, _ in window}
        for entry, size in window:
            if entry.url in self.held:
                self.held.move_to_end(entry.url)
                continue
            self.fetched += entry.bytes
            for url in [url for url in self.held if url not in needed]:
                if len(self.held) < WINDOW_SHARDS or sum(self.held.values()) + size <= self.capacity:
                    break
                del self.held[url]
            self.held[entry.url] = size


def planned_reads(index: ShardIndex, layout: Layout, *, readers: int, capacity: int = CACHE_BYTES) -> Reads:
    """Bytes that `readers` reading tasks fetch in the first epoch, or in MOST_CHUNKS of a large set.

    Exact for readers that take turns; a test compares the result with the bytes that a server sends.

    Args:
        capacity: bytes that a reader holds where they are more than three shards.
    """
    chunks = epoch_chunks(index, layout)
    images = 3 * layout.resolution**2 * (1 if layout.condition_member is None else 2)
    cached = images if index.samples * images <= CACHE_BYTES else 0  # decoded bytes of a sample in the cache
    workers = [PlannedReader(capacity) for _ in range(readers)]
    for number, chunk in enumerate(chunks):
        for _, entries in chunk.windows:
            read = [entry for entry in entries if entry.train_samples]
            # in memory: files of the training samples, and a decoded image for each where images are cached
            sizes = (round(e.bytes * e.train_samples / e.samples) + e.train_samples * cached for e in read)
            workers[number % readers].read(list(zip(read, sizes, strict=True)))
    set_bytes = sum(entry.bytes for entry in index.shards if entry.train_samples)
    rows = chunks[-1].last - chunks[0].first
    return Reads(sum(worker.fetched for worker in workers), rows / index.train_samples * set_bytes)


def epoch_chunks(index: ShardIndex, layout: Layout) -> list[Chunk]:
    """The chunks of the first epoch, at most MOST_CHUNKS."""
    steps = -(-index.train_samples // layout.global_batch_size)
    return list(islice(plan_chunks(index, layout, start_step=0, total_steps=steps), MOST_CHUNKS))


def recommended_samples(index: ShardIndex, layout: Layout, *, readers: int) -> int:
    """The largest of SIZES, samples of a shard, whose read amplification is at most GOOD.

    The smallest of SIZES if none is small enough.
    """
    mean = sum(entry.bytes for entry in index.shards) / index.samples
    for samples in SIZES:
        even = even_index(index, samples_per_shard=samples, sample_bytes=mean, most=100 * layout.chunk_rows)
        if planned_reads(even, layout, readers=readers).amplification <= GOOD:
            return samples
    return SIZES[-1]


def even_index(index: ShardIndex, *, samples_per_shard: int, sample_bytes: float, most: int) -> ShardIndex:
    """An imagined index of the set, or of `most` samples, with shards of about equal size.

    Sizes differ a little, as those of real shards do, or windows and chunks of the same size would fall together.
    """
    share, some = index.train_samples / index.samples, max(2, samples_per_shard // 16)
    counts = [samples_per_shard - n % some for n in range(-(-min(index.samples, most) // samples_per_shard))]
    shards = tuple(_imagined(str(n), round(count * sample_bytes), count, share) for n, count in enumerate(counts))
    return index.model_copy(update={"shards": shards, "train_samples": sum(entry.train_samples for entry in shards)})


def _imagined(url: str, size: int, samples: int, train_share: float) -> ShardEntry:
    counts = {"samples": samples, "train_samples": max(1, round(samples * train_share))}
    return ShardEntry.model_construct(url=url, bytes=size, sha256="", quarantined=(), **counts)


def estimated_index(tars: Sequence[FileVersion], *, holdout_fraction: float, text_length: int) -> ShardIndex:
    """An index with the tars' real sizes, and numbers of samples estimated from the first tar's head.

    Args:
        tars: at least one, from `list_tars`.

    Raises as `read_range`.
    """
    mean = sample_bytes(read_range(tars[0].path, 0, HEAD_BYTES))
    share = 1 - holdout_fraction
    entries = [_imagined(tar.path, tar.bytes, max(1, round(tar.bytes / mean)), share) for tar in tars]
    return ShardIndex(
        source="webdataset",
        license=LICENSE,
        resolution=None,
        classes=(),
        holdout_fraction=holdout_fraction,
        samples=sum(entry.samples for entry in entries),
        train_samples=sum(entry.train_samples for entry in entries),
        quarantined=0,
        text=TextInfo(sha256="", vocab_size=0, text_length=text_length),
        shards=tuple(entries),
    )


def sample_bytes(head: bytes) -> float:
    """Mean bytes from sample to sample in a file's head; len(head) for fewer than two samples."""
    unpacked = zlib.decompressobj(wbits=31).decompress(head) if head.startswith(GZIP) else head
    starts: dict[str, int] = {}  # sample -> offset of its image
    try:
        with tarfile.open(fileobj=io.BytesIO(unpacked), mode="r:") as tar:
            for info in tar:
                folder, _, name = info.name.rpartition("/")
                stem, _, suffix = name.partition(".")
                if info.isfile() and suffix.lower() in IMAGE_SUFFIXES:
                    starts.setdefault(f"{folder}/{stem}", info.offset)
    except tarfile.TarError:  # the head ends within a member
        pass
    if len(starts) < 2:
        return float(max(1, len(head)))
    unpacked_bytes = (max(starts.values()) - min(starts.values())) / (len(starts) - 1)
    return unpacked_bytes * len(head) / len(unpacked)
