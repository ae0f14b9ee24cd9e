"""How many bytes readers fetch for each byte of a set: whole shards, as often as `stream.py` cuts their windows into
chunks for different readers. Found by planning the chunks of an epoch and going through what each reader would hold; no
byte is read.

Chunk i is taken to be read by reader i mod R, as it is while all are equally fast.
"""

from collections import OrderedDict
from collections.abc import Sequence
from itertools import islice
from typing import NamedTuple

from components.data.decoded import CACHE_BYTES
from components.data.order import WINDOW_SHARDS
from components.data.shards import ShardEntry, ShardIndex
from components.data.stream import Chunk, Layout, plan_chunks

MOST_CHUNKS = 2000  # that are planned of an epoch: of ten million images at 64², of a million at 256²
SIZES = (2048, 1024, 512, 256, 128, 64, 32, 16, 8)  # samples a shard that are recommended
GOOD = 1.25  # bytes read for each byte of the set, with the size that is recommended


class Reads(NamedTuple):
    """What readers fetch, and what they serve."""

    fetched: int  # bytes
    served: float  # bytes of the set, by its mean sample

    @property
    def amplification(self) -> float:
        """Bytes read for each byte of the set."""
        return self.fetched / self.served


class PlannedReader:
    """The shards that a reading process holds, as `ShardCache` does, by their sizes alone."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity  # bytes
        self.held: OrderedDict[str, int] = OrderedDict()  # url -> bytes, that used last at the end
        self.fetched = 0

    def read(self, window: Sequence[tuple[ShardEntry, int]]) -> None:
        """Count what is fetched for the shards of a window, each with the bytes that it takes in memory."""
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
    """What `readers` reading tasks fetch in the first epoch, or of a large set in the first part of it.

    Exact for readers that take turns; a test holds it against the bytes that a server sends.

    Args:
        capacity: bytes that a reader holds where they are more than three shards.
    """
    chunks = epoch_chunks(index, layout)
    images = 3 * layout.resolution**2 * (1 if layout.condition_member is None else 2)
    kept = images if index.samples * images <= CACHE_BYTES else 0  # bytes of a sample that is kept decoded
    workers = [PlannedReader(capacity) for _ in range(readers)]
    for number, chunk in enumerate(chunks):
        for _, entries in chunk.windows:
            read = [entry for entry in entries if entry.train_samples]
            workers[number % readers].read([(entry, held_bytes(entry, kept)) for entry in read])
    set_bytes = sum(entry.bytes for entry in index.shards if entry.train_samples)
    rows = chunks[-1].last - chunks[0].first
    return Reads(sum(worker.fetched for worker in workers), rows / index.train_samples * set_bytes)


def epoch_chunks(index: ShardIndex, layout: Layout) -> list[Chunk]:
    """The work of tasks for the first epoch, at most MOST_CHUNKS of them."""
    steps = -(-index.train_samples // layout.global_batch_size)
    return list(islice(plan_chunks(index, layout, start_step=0, total_steps=steps), MOST_CHUNKS))


def recommended_samples(index: ShardIndex, layout: Layout, *, readers: int) -> int:
    """The largest number of samples a shard, of SIZES, with which at most GOOD bytes are read for each of the set.

    The smallest of SIZES if none is small enough.
    """
    mean = sum(entry.bytes for entry in index.shards) / index.samples
    for samples in SIZES:
        made = even_index(index, samples_per_shard=samples, sample_bytes=mean, most=100 * layout.chunk_rows)
        if planned_reads(made, layout, readers=readers).amplification <= GOOD:
            return samples
    return SIZES[-1]


def even_index(index: ShardIndex, *, samples_per_shard: int, sample_bytes: float, most: int) -> ShardIndex:
    """The same set, or `most` samples of it, in shards of about one size that nobody wrote.

    They differ a little, as real ones do, or windows and chunks of the same size would fall together.
    """
    share, some = index.train_samples / index.samples, max(2, samples_per_shard // 16)
    shards = []
    for number in range(-(-min(index.samples, most) // samples_per_shard)):
        samples = samples_per_shard - number % some
        size, train = round(samples * sample_bytes), max(1, round(samples * share))
        shards.append(
            ShardEntry.model_construct(
                url=str(number), bytes=size, sha256="", samples=samples, train_samples=train, quarantined=()
            )
        )
    total = sum(entry.train_samples for entry in shards)
    return index.model_copy(update={"shards": tuple(shards), "train_samples": total})


def held_bytes(entry: ShardEntry, kept: int) -> int:
    """What the training samples of a shard take in memory: their files, and the decoded images that are kept."""
    return round(entry.bytes * entry.train_samples / entry.samples) + entry.train_samples * kept
