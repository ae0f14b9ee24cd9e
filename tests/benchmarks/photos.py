"""Sets for measurements: tars of photograph-like JPEGs, and memory of the processes that read."""

import io
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import s3fs
from PIL import Image

from tests.image_sets import tar_of
from tests.waiting import watching

DIFFERENT = 32  # images; the others are the same again
SECONDS_BETWEEN = 0.1


def write_photos(folder: Path, *, resolution: int, shards: int, samples: int) -> str:
    """Tars of `samples` JPEGs each; returns their glob. About as many bytes as photographs have."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(0)
    files = [photo(draw, resolution) for _ in range(DIFFERENT)]
    for shard in range(shards):
        keys = [(f"{shard:04d}-{number:05d}", files[number % DIFFERENT]) for number in range(samples)]
        members = [(f"{key}.{name}", data) for key, image in keys for name, data in (("cls", b"1"), ("jpg", image))]
        (folder / f"photos-{shard:04d}.tar").write_bytes(tar_of(members))
    return f"{folder}/*.tar"


def photo(draw: np.random.Generator, resolution: int) -> bytes:
    """A JPEG whose spectrum falls with the frequency, as that of natural images does."""
    pixels = np.full((resolution, resolution, 3), 128.0)
    for size in (4, 16, 64, 256):
        if size <= resolution:
            noise = draw.normal(0, 160 / size**0.5, (size, size, 3)).clip(-127, 127) + 128
            larger = Image.fromarray(noise.astype(np.uint8)).resize((resolution, resolution), Image.Resampling.BICUBIC)
            pixels += np.asarray(larger, np.float64) - 128
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def upload(folder: Path, address: str, bucket: str) -> None:
    """The tars of a folder into a new bucket, readable by all: the peer's curl signs nothing."""
    files = s3fs.S3FileSystem(endpoint_url=address, skip_instance_cache=True)
    files.mkdir(bucket)
    for tar in sorted(folder.glob("*.tar")):
        files.put_file(str(tar), f"{bucket}/{tar.name}", ACL="public-read")


def peak_megabytes(work: Callable[[], object], *, name: str) -> float:
    """Largest private memory of any process below this one whose command matches `name`, while `work` goes on."""
    peaks = [0]

    def look() -> None:
        peaks.extend(private_bytes(process, name) for process in psutil.Process().children(recursive=True))

    with watching(look, pause=SECONDS_BETWEEN):
        work()
    return max(peaks) / 2**20


def private_bytes(process: psutil.Process, name: str) -> int:
    try:
        return process.memory_full_info().uss if re.search(name, " ".join(process.cmdline())) else 0
    except psutil.Error:
        return 0
