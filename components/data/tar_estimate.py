"""Estimated indexes of tars, from a listing and the first bytes of a single tar."""

import io
import tarfile
import zlib
from collections.abc import Sequence

from components.data.listing import FileVersion
from components.data.shards import ShardEntry, ShardIndex, TextInfo
from components.data.sources.webdataset import LICENSE
from components.data.tars import GZIP, IMAGE_SUFFIXES
from components.runtime.storage.store import read_range

HEAD_BYTES = 8 * 2**20  # bytes to read of the first tar


def estimated_index(tars: Sequence[FileVersion], *, holdout_fraction: float, text_length: int) -> ShardIndex:
    """An index with the tars' real sizes, and numbers of samples estimated from the first tar's head.

    Args:
        tars: at least one, from `list_tars`.

    Raises as `read_range`.
    """
    mean = sample_bytes(read_range(tars[0].path, 0, HEAD_BYTES))
    entries = []
    for tar in tars:
        samples = max(1, round(tar.bytes / mean))
        train = max(1, round(samples * (1 - holdout_fraction)))
        entries.append(
            ShardEntry(url=tar.path, bytes=tar.bytes, sha256="", samples=samples, train_samples=train, quarantined=())
        )
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
