"""The ranks of a node fetch a checkpoint once between them, and agree on what they found: real gloo processes."""

import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from components.runtime.storage.store import DamagedFileError, Store
from components.training import run_folder
from components.training.checkpoint import STATE, WEIGHTS
from components.training.parallel import ALONE, Worker
from components.training.run_folder import fetch_checkpoint, fetch_once, read_on_node, upload_folder
from tests.checkpoints import write_checkpoint
from tests.distributed.gloo import run_two_ranks

NAME = "step-000000007"


def saved(folder: Path) -> Store:
    """A run folder with one checkpoint."""
    run = Store(str(folder / "run"))
    write_checkpoint(folder / "written", {"weights": {"a": torch.arange(4.0)}, "seconds": 1.5}, step=7)
    upload_folder(folder / "written", run, NAME)
    (folder / "node").mkdir()
    return run


def read_rank(worker: Worker, folder: Path) -> None:
    """Read it twice, then damaged, on a node whose temporary folder is `folder/node`; write down each fetch."""
    tempfile.tempdir = str(folder / "node")
    run = Store(str(folder / "run"))

    def fetch(*arguments: Any) -> Path:
        with open(folder / "fetched", "a") as file:
            file.write(f"{worker.rank}\n")
        return fetch_checkpoint(*arguments)

    run_folder.fetch_checkpoint = fetch
    for _ in range(2):
        step, state = read_on_node(run, NAME, worker)
        assert (step, state["seconds"], state["weights"]["a"].tolist()) == (7, 1.5, [0, 1, 2, 3])
    torch.distributed.barrier()
    if worker.rank == 0:
        run.write(f"{NAME}/{WEIGHTS}", b"other bytes")
    torch.distributed.barrier()
    with pytest.raises(DamagedFileError, match=r"weights\.safetensors differs"):
        read_on_node(run, NAME, worker)


def test_two_ranks_of_a_node_fetch_once_and_leave_nothing_and_both_say_what_is_damaged(tmp_path: Path) -> None:
    saved(tmp_path)
    run_two_ranks(read_rank, tmp_path)
    assert len((tmp_path / "fetched").read_text().split()) == 3  # twice whole and once damaged, whatever the ranks
    assert os.listdir(tmp_path / "node") == []


def test_a_fetch_that_broke_off_is_begun_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, place = saved(tmp_path), tmp_path / "node" / "place"

    def breaks_off(run: Store, name: str, local: Path) -> Path:
        fetch_checkpoint(run, name, local)
        (local / STATE).unlink()
        raise OSError("no space left on the device")

    monkeypatch.setattr(run_folder, "fetch_checkpoint", breaks_off)
    with pytest.raises(OSError, match="no space"):
        fetch_once(run, NAME, place)
    assert sorted(path.name for path in place.iterdir()) in ([], ["lock"])
    monkeypatch.undo()
    assert (fetch_once(run, NAME, place) / STATE).exists()


def test_no_start_finds_what_an_earlier_one_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert len({run_folder.place_on_node(ALONE) for _ in range(50)}) == 50
