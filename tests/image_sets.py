"""Small real sets of images for tests: shards written by the writer that the product uses."""

import gzip
import hashlib
import io
import json
import tarfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from components.data import ingest, parts
from components.data.held_out import SplitArrays, read_split
from components.data.ingest import train_bpe
from components.data.parts import WARN, PartWriter, Warn, part_name
from components.data.shards import (
    BPE,
    ShardEntry,
    ShardIndex,
    TextInfo,
    View,
    load_index,
    save_index,
    split_of,
)
from components.data.sources.scenes import list_scenes
from components.data.stream import Layout, RankReader, Samples, Share
from components.data.tars import Group, write_shard
from components.runtime.storage.store import Store

STREAMS = 12
CLASSES = ("red", "green", "blue")
CAPTIONS = ("a red square", "a green square", "a blue square")


def image(number: int, *, resolution: int = 8) -> np.ndarray:
    """An image that tells its number: red and green channel hold it."""
    pixels = np.full((resolution, resolution, 3), 127, np.uint8)
    pixels[..., 0], pixels[..., 1] = number % 256, number // 256
    return pixels


def read_whole_shard(index: ShardIndex, entry: ShardEntry, view: View) -> SplitArrays:
    """All usable samples of a shard, of both splits, in tar order. Raises ShardError."""
    return read_split(index.model_copy(update={"shards": (entry,)}), None, view)


def ingest_here(
    source: str, path: Path | None, out: Path, *, reshard: bool = False, warn: Warn = WARN, **changes: Any
) -> ShardIndex:
    """The ingest without Ray, in this process."""
    numbers = {"resolution": 8, "samples_per_shard": 5, "holdout_fraction": 0.1, "vocab_size": 300, "text_length": 8}
    config = ingest.IngestConfig(**numbers | changes)
    with pytest.MonkeyPatch.context() as patch:
        for module in (ingest, parts):
            patch.setattr(module, "run_pieces", lambda work, pieces, **_: map(work, pieces))
        place = None if path is None else str(path)
        return ingest.ingest(source, place, out=Store(str(out)), config=config, reshard=reshard, warn=warn)


def write_files(folder: Path, files: Mapping[str, bytes | str]) -> Path:
    """Files by their paths below the folder, which is returned."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def number_of(pixels: np.ndarray) -> np.ndarray:
    """The numbers of images (..., H, W, 3)."""
    return pixels[..., 0, 0, 0].astype(int) + 256 * pixels[..., 0, 0, 1].astype(int)


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_set(
    store: Store, *, sizes: tuple[int, ...], holdout_fraction: float = 0.1, resolution: int = 8
) -> ShardIndex:
    """Shards of the given sizes whose images are numbered through, and their index."""
    entries, number = [], 0
    for shard, size in enumerate(sizes):
        numbers = range(number, number := number + size)
        entries.append(_write(store, f"shard-{shard:06d}.tar", numbers, holdout_fraction, resolution))
    bpe = train_bpe(CAPTIONS, vocab_size=300)
    store.write(BPE, bpe.encode())
    index = ShardIndex(
        source="numbers",
        license="none",
        resolution=resolution,
        classes=CLASSES,
        holdout_fraction=holdout_fraction,
        samples=number,
        train_samples=sum(entry.train_samples for entry in entries),
        quarantined=0,
        text=TextInfo(sha256=hashlib.sha256(bpe.encode()).hexdigest(), vocab_size=300, text_length=8),
        shards=tuple(entries),
    )
    save_index(store, index)
    return load_index(store.uri)


def write_scenes(store: Store, *, sizes: tuple[int, ...], resolution: int) -> ShardIndex:
    """Shards of scenes, each with its depth map and its mask, as the ingest writes them."""
    index = write_set(store, sizes=(2,))
    source, entries, first = list_scenes(sum(sizes)), [], 0
    write = PartWriter(source.reader, store, resolution, index.holdout_fraction)
    for number, size in enumerate(sizes):
        entries.append(write.write(part_name(number), json.dumps(source.items[first : first + size])).entry)
        first += size
    counts = {"samples": sum(sizes), "train_samples": sum(entry.train_samples for entry in entries)}
    index = index.model_copy(update={"shards": tuple(entries), "classes": source.classes, **counts})
    save_index(store, index)
    return load_index(store.uri)


def _write(store: Store, name: str, numbers: range, holdout_fraction: float, resolution: int) -> ShardEntry:
    samples = [
        {
            "__key__": f"{number:06d}",
            "png": png(image(number, resolution=resolution)),
            "cls": str(number % 3).encode(),
            "txt": CAPTIONS[number % 3].encode(),
            "json": json.dumps({"number": number}).encode(),
        }
        for number in numbers
    ]
    data = write_shard(samples)
    store.write(name, data)
    train = sum(split_of(f"{number:06d}", holdout_fraction) == "train" for number in numbers)
    return ShardEntry(
        url=name, bytes=len(data), sha256=hashlib.sha256(data).hexdigest(), samples=len(numbers), train_samples=train
    )


def rewrite(store: Store, entry: ShardEntry, groups: Iterable[Group]) -> ShardEntry:
    """A shard of the set with other members, and the entry that an index has for it."""
    data = write_shard({"__key__": group.key, **group.members} for group in groups)
    store.write(entry.url, data)
    return entry.model_copy(update={"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()})


def read_rows(
    samples: Samples, *, first: int = 0, last: int = 12, batch: int = 4, seed: int = 3, **place: int
) -> dict[str, np.ndarray]:
    """Rows of the steps [first, last) of a rank, all if no `place` is given; read in this process."""
    share = Share(batch, seed, STREAMS, last, first, **place)
    return RankReader(samples, share, layout=Layout.of(samples, share)).rows(first, last)


def write_idx(folder: Path, images: np.ndarray, labels: np.ndarray, *, compress: bool) -> None:
    """Images uint8 (N, H, W) and labels uint8 (N,) as the IDX files of MNIST."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in (("train-images-idx3-ubyte", images), ("train-labels-idx1-ubyte", labels)):
        data = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()
        (folder / (f"{name}.gz" if compress else name)).write_bytes(gzip.compress(data) if compress else data)


def write_parquet(
    path: Path,
    numbers: Sequence[int],
    *,
    rows_per_group: int = 10,
    corrupt: Collection[int] = (),
    labels: Sequence[int | None] | None = None,
    side: int = 20,
    more: dict[str, list] | None = None,
) -> None:
    """A file as `datasets` writes it: `image` {bytes, path}, `label` with its names in the schema, `caption`.

    Args:
        labels: in place of number % 3.
        more: further columns.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    files = [png(image(number, resolution=side)) for number in numbers]
    cells = [
        {"bytes": data[: len(data) // 2] if number in corrupt else data, "path": f"{number}.png"}
        for number, data in zip(numbers, files, strict=True)
    ]
    columns = {
        "image": pa.array(cells, pa.struct({"bytes": pa.binary(), "path": pa.string()})),
        "label": pa.array([number % 3 for number in numbers] if labels is None else labels, pa.int64()),
        "caption": pa.array([f"{CAPTIONS[number % 3]} {number}" for number in numbers]),
        **{name: pa.array(values) for name, values in (more or {}).items()},
    }
    features = {
        "image": {"_type": "Image"},
        "label": {"names": list(CLASSES), "_type": "ClassLabel"},
        "caption": {"dtype": "string", "_type": "Value"},
    }
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    pq.write_table(pa.table(columns).replace_schema_metadata(metadata), path, row_group_size=rows_per_group)


def write_tar(
    path: Path,
    numbers: range,
    *,
    side: int,
    members: tuple[str, ...] = ("png", "cls", "txt"),
    corrupt: set[int] = frozenset(),
    extra: dict[str, bytes] | None = None,
) -> None:
    """A tar as users have them: numbered images of any size, class names instead of labels."""
    files: dict[str, bytes] = {}
    for number in numbers:
        data = png(image(number, resolution=side))
        parts = {
            "png": data[: len(data) // 2] if number in corrupt else data,
            "cls": CLASSES[number % 3].encode(),
            "txt": CAPTIONS[number % 3].encode(),
        }
        files |= {f"{number:06d}.{name}": parts[name] for name in members}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tar_of(sorted((files | (extra or {})).items())))


def tar_of(members: Iterable[tuple[str | tarfile.TarInfo, bytes]], *, end: bool = True) -> bytes:
    """A tar of (name or header, content); without `end` it is cut after the last member."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name) if isinstance(name, str) else name
            info.size = info.size or len(data)
            tar.addfile(info, io.BytesIO(data))
        used = tar.offset
    return buffer.getvalue() if end else buffer.getvalue()[:used]
