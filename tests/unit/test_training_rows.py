"""Weights in rows of several ranks become one file, the bytes that one host would write."""

import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from components.runtime.storage.store import DamagedFileError, Store
from components.training.parallel import shard_rows
from components.training.rows import fetch_rows, join_rows, rows_file, send_rows, shapes_in, write_tensors

DTYPES = (
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.float16),
    *(torch.bfloat16, torch.int32, torch.float32, torch.float64, torch.int64),
)
WHOLE = {"uncut", "scale"}  # as buffers are


def tensors(seed: int = 0) -> dict[str, Tensor]:
    """A tensor of each type, of each number of dimensions, and one without numbers."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {str(dtype): torch.randint(0, 2, (7, 3), generator=generator).to(dtype) for dtype in DTYPES}
    drawn["é.weight"] = torch.randn(5, 2, 3, generator=generator)
    return drawn | {"bias": torch.randn(3, generator=generator), "uncut": torch.zeros(2, 0), "scale": torch.tensor(2.0)}


def write_parts(folder: Path, whole: dict[str, Tensor], parts: int) -> list[Path]:
    folder.mkdir(exist_ok=True)
    for part in range(parts):
        names = [name for name in whole if part == 0 or name not in WHOLE]
        cut = {name: slice(*shard_rows(len(whole[name]), part, parts)) for name in names if name not in WHOLE}
        rows = {name: whole[name][cut[name]].clone() if name in cut else whole[name] for name in names}
        save_file(rows, folder / rows_file("model", part, parts))
    return sorted(folder.iterdir())


@pytest.mark.parametrize("parts", [1, 2, 3, 4])
def test_parts_are_joined_to_the_bytes_of_the_whole(parts: int, tmp_path: Path) -> None:
    """Four parts of three rows: the last one has none."""
    save_file(tensors(), tmp_path / "whole")
    join_rows(write_parts(tmp_path / "parts", tensors(), parts), tmp_path / "joined")
    assert (tmp_path / "joined").read_bytes() == (tmp_path / "whole").read_bytes()


def test_one_piece_of_a_tensor_is_held_at_a_time(tmp_path: Path) -> None:
    whole, held = tensors(), list[weakref.ref[Tensor]]()
    save_file(whole, tmp_path / "whole")

    def pieces(name: str) -> Iterator[Tensor]:
        for row in range(len(whole[name])) if whole[name].ndim else [...]:
            assert all(piece() is None for piece in held)
            piece = whole[name][row].clone()
            held.append(weakref.ref(piece))
            yield piece
            del piece

    write_tensors(tmp_path / "joined", shapes_in(tmp_path / "whole"), pieces)
    assert len(held) > len(whole)
    assert (tmp_path / "joined").read_bytes() == (tmp_path / "whole").read_bytes()


def test_rows_of_the_last_try_count_whatever_the_number_of_ranks_before(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    for seed, parts in enumerate((4, 2, 3)):
        write_parts(tmp_path / str(parts), tensors(seed), parts)
        send_rows(tmp_path / str(parts), store, parts=parts)
    fetch_rows(store, tmp_path / "fetched")
    assert [path.name for path in (tmp_path / "fetched").iterdir()] == ["model.safetensors"]
    found, expected = load_file(tmp_path / "fetched" / "model.safetensors"), tensors(2)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_part_that_is_gone_or_differs_is_found(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    write_parts(tmp_path / "parts", tensors(), 2)
    send_rows(tmp_path / "parts", store, parts=2)
    second = rows_file("model", 1, 2)
    store.write(second, store.read(second)[:-1] + b"?")
    with pytest.raises(DamagedFileError, match=second):
        fetch_rows(store, tmp_path / "fetched")
    store.delete(second)
    with pytest.raises((DamagedFileError, FileNotFoundError), match=second):
        fetch_rows(store, tmp_path / "fetched")
