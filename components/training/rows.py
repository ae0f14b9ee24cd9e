"""Weights in rows: what each rank holds of them as a safetensors file, and one file joined of all.

Where networks are in shards `model-00002-of-00008.safetensors` holds the third rank's rows of every tensor in shards;
the first part holds all other tensors too. Parts are joined from disk to disk, a rank's rows of a tensor at a time: no
host needs memory for a whole model. A single part is the whole file, `model.safetensors`."""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor, uint8

from components.runtime.storage.artifact import Record, describe, read_records, recorded_parts, write_record
from components.runtime.storage.store import Store, in_parallel
from components.training.checkpoint import part_file

# Bytes of a number by type, in the order of safetensors: a file has the types from last to first.
WIDTHS = {"BOOL": 1, "U8": 1, "I8": 1, "I16": 2, "F16": 2, "BF16": 2, "I32": 4, "F32": 4, "F64": 8, "I64": 8}
Shapes = Mapping[str, tuple[str, Sequence[int]]]  # name -> type (a key of WIDTHS), shape


def rows_file(stem: str, part: int, parts: int) -> str:
    """Name of a part's file; that of the whole where there is one part."""
    return f"{stem}-{part_file(part, parts)}" if parts > 1 else f"{stem}.safetensors"


def send_rows(folder: Path, store: Store, *, parts: int = 1) -> None:
    """Copy the files in `folder`, each of so many `parts`, to `store`, with a record of size and sha256.
    The first part's record has the name of the whole and the number of parts: it holds for the last try."""
    for path in sorted(folder.iterdir()):
        store.upload(path, path.name)
        name = path.name.removesuffix(f"-{part_file(0, parts)}").removesuffix(".safetensors")
        write_record(store, name, describe(path, path.name), parts=parts)


def fetch_rows(store: Store, folder: Path) -> None:
    """Copy what `send_rows` has sent to `folder`, joined.
    Raises FileNotFoundError or DamagedFileError for a file that is gone or differs from its record."""
    stems = sorted(name for name in recorded_parts(store) if "-of-" not in name)
    for stem, first in zip(stems, read_records(store, stems), strict=True):
        parts = int(first.facts["parts"])
        others = [rows_file(stem, part, parts).removesuffix(".safetensors") for part in range(1, parts)]
        paths = in_parallel(lambda record: download(store, record, folder), [first, *read_records(store, others)])
        if parts > 1:
            join_rows(paths, folder / rows_file(stem, 0, 1))
            for path in paths:
                path.unlink()


def download(store: Store, record: Record, folder: Path) -> Path:
    """The local copy of a part, verified."""
    (file,) = record.files
    store.download(file.path, folder, file.path, expected=file.digest)
    return folder / file.path


def join_rows(parts: Sequence[Path], path: Path) -> None:
    """Join the files of all parts, in order, into one."""
    files = [safe_open(part, "pt") for part in parts]
    holders = {name: [file for file in files if name in file.keys()] for name in files[0].keys()}  # noqa: SIM118
    shapes = {name: joined_shape(name, own) for name, own in holders.items()}
    write_tensors(path, shapes, lambda name: (file.get_tensor(name) for file in holders[name]))


def joined_shape(name: str, files: Sequence[Any]) -> tuple[str, list[int]]:
    """Type and shape of a tensor whose rows lie in `files`."""
    slices = [file.get_slice(name) for file in files]
    shape = slices[0].get_shape()
    if len(slices) > 1:
        shape = [sum(piece.get_shape()[0] for piece in slices), *shape[1:]]
    return slices[0].get_dtype(), shape


def shapes_in(path: Path) -> Shapes:
    """Types and shapes of the tensors in a safetensors file, without reading them."""
    with safe_open(path, "pt") as file:
        return {name: joined_shape(name, [file]) for name in file.keys()}  # noqa: SIM118


def write_tensors(path: Path, shapes: Shapes, pieces: Callable[[str], Iterable[Tensor]]) -> None:
    """Write a safetensors file piece by piece, with the bytes that `save_file` writes of the whole.
    `pieces` is called with each name, in the order of the file; gives the rows in order, in one or several tensors, of
    which each is forgotten before the next one is asked for."""
    order, header, end = [*WIDTHS], dict[str, Any](), 0
    for name in sorted(shapes, key=lambda name: (-order.index(shapes[name][0]), name)):
        kind, shape = shapes[name]
        begin, end = end, end + WIDTHS[kind] * math.prod(shape)
        header[name] = {"dtype": kind, "shape": [*shape], "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in header:
            for piece in pieces(name):
                file.write(piece.contiguous().reshape(-1).view(uint8).numpy().data)
                del piece
        assert file.tell() == 8 + len(text) + end, f"{path.name}: tensors of other sizes than were said"
