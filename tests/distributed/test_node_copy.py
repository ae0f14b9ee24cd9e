"""The ranks of a node fetch a checkpoint once between them, and agree on what they found: real gloo processes."""

import json
import os
import pickle
import tempfile
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from components.runtime.storage.store import DamagedFileError, Store, digest_of
from components.training import run_folder
from components.training.checkpoint import STATE, digests_file, part_file
from components.training.parallel import ALONE, Worker
from components.training.run_folder import fetch_once, restore_on_node, upload_folder
from tests.checkpoints import write_checkpoint
from tests.distributed.gloo import run_ranks

NAME, TENSORS = "step-000000007", part_file(0, 1)


def saved(folder: Path) -> Store:
    """A run folder with one checkpoint."""
    run = Store(str(folder / "run"))
    write_checkpoint(folder / "written", {"weights": {"a": torch.arange(4.0)}, "elapsed": [1.5, 1.25]}, step=7)
    upload_folder(folder / "written", run, NAME)
    (folder / "node").mkdir()
    return run


class Restored:
    """A task that keeps what it is given."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state


def read_rank(worker: Worker, folder: Path) -> None:
    """Read it twice, then damaged, on a node whose temporary folder is `folder/node`; write down each fetch."""
    tempfile.tempdir = str(folder / "node")
    run, task, download = Store(str(folder / "run")), Restored(), Store.download

    def fetch(store: Store, path: str, *arguments: Any, **options: Any) -> None:
        with open(folder / "fetched", "a") as file:
            file.write(f"{path}\n")
        download(store, path, *arguments, **options)

    Store.download = fetch
    for _ in range(2):
        assert restore_on_node(run, NAME, cast(Any, task), worker) == (7, (1.5, 1.25))
        assert task.state["weights"]["a"].tolist() == [0, 1, 2, 3]
    torch.distributed.barrier()
    if worker.rank == 0:
        run.write(f"{NAME}/{TENSORS}", b"other bytes")
    torch.distributed.barrier()
    with pytest.raises(DamagedFileError, match=r"00000-of-00001\.safetensors differs"):
        restore_on_node(run, NAME, cast(Any, task), worker)


def test_two_ranks_of_a_node_fetch_once_and_leave_nothing_and_both_say_what_is_damaged(tmp_path: Path) -> None:
    saved(tmp_path)
    run_ranks(2, read_rank, tmp_path)
    fetched = (tmp_path / "fetched").read_text().split()
    assert sorted(fetched) == [f"{NAME}/{TENSORS}"] * 3 + [f"{NAME}/{STATE}"] * 3  # twice whole, once damaged
    assert os.listdir(tmp_path / "node") == []


def test_a_fetch_that_broke_off_is_begun_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, place, download = saved(tmp_path), tmp_path / "node" / "place", Store.download

    def breaks_off(store: Store, path: str, folder: Path, name: str, **options: Any) -> None:
        download(store, path, folder, name, **options)
        (folder / name).write_bytes((folder / name).read_bytes()[:10])
        raise OSError("no space left on the device")

    monkeypatch.setattr(Store, "download", breaks_off)
    with pytest.raises(OSError, match="no space"):
        fetch_once(run, NAME, TENSORS, place=place)
    monkeypatch.undo()
    assert fetch_once(run, NAME, TENSORS, place=place).read_bytes() == run.read(f"{NAME}/{TENSORS}")


@pytest.mark.parametrize("content", [pickle.dumps({"a": 1}), b"", b"PK"])
def test_what_is_no_safetensors_file_is_refused_in_a_line_and_never_opened(content: bytes, tmp_path: Path) -> None:
    """With a digest of its own too: what was put there with the list is no state all the same."""
    run = saved(tmp_path)
    digests = json.loads(run.read(f"{NAME}/{digests_file(TENSORS)}")) | {TENSORS: digest_of(content)}
    run.write(f"{NAME}/{TENSORS}", content)
    run.write(f"{NAME}/{digests_file(TENSORS)}", json.dumps(digests).encode())
    with pytest.raises(DamagedFileError, match=r"00000-of-00001\.safetensors is no safetensors file: ") as caught:
        restore_on_node(run, NAME, cast(Any, Restored()), ALONE)
    assert "\n" not in str(caught.value)


def test_no_start_finds_what_an_earlier_one_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert len({run_folder.place_on_node(ALONE) for _ in range(50)}) == 50
