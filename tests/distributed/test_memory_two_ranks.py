"""Ranks agree on how many samples they have room for, whichever of them runs out, and where: real gloo processes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from components.runtime.storage.store import Store
from components.training.batches import to_batch
from components.training.loop import Task, fit
from components.training.memory import KEPT, NoRoomError, with_room
from components.training.parallel import Worker
from components.training.reporting import Reporter
from tests.distributed.gloo import run_ranks
from tests.distributed.recording import FileRecorder
from tests.limited_memory import limit_memory, limit_memory_of_backward
from tests.tiny_training import assert_equal_bits, batches, weights_of
from tests.trained_networks import made

STEPS, ROOM, SHARE = 6, 2, 4
# Steps with collectives of their own: codes and adaptive weight, losses drawn by, pairs of all ranks.
FORWARD, BACKWARD = ("tokenizer", "hybrid", "contrastive", "base"), ("base", "hybrid")
CASES = [*(f"{kind}-forward" for kind in FORWARD), *(f"{kind}-backward" for kind in BACKWARD)]


def rows_in(folder: Path, task: Task, config: Any, worker: Worker) -> Any:
    recorder = FileRecorder(folder / f"log-{worker.rank}.jsonl")
    reporter = Reporter(config.optimization, stage="base", worker=worker, recorder=recorder, start_step=0)
    return with_room(task, batches(config, to_batch, worker=worker), reporter, Store(str(folder)))


def train_rank(worker: Worker, folder: Path) -> None:
    for case in CASES:
        kind, where = case.split("-")
        config, task = made(kind, worker=worker, total_steps=STEPS)
        if worker.rank == 1:
            (limit_memory if where == "forward" else limit_memory_of_backward)(task, ROOM)
        fit(task, rows_in(folder / case, task, config, worker), config.optimization)
        save(task, folder / f"{case}-{worker.rank}.safetensors")
    for kind in FORWARD:
        config, task = made(kind, worker=worker, total_steps=STEPS)
        task.max_batch = ROOM
        fit(task, batches(config, to_batch, worker=worker), config.optimization)
        save(task, folder / f"{kind}-told-{worker.rank}.safetensors")
    (folder / f"refused-{worker.rank}").write_text(refused(folder / "gan", worker))


def save(task: Task, path: Path) -> None:
    weights = {name: tensor.contiguous() for name, tensor in weights_of(task).items()}
    save_file({**weights, "room": torch.tensor(task.max_batch)}, path)


def refused(folder: Path, worker: Worker) -> str:
    """What a rank says where only the last one has no room for the whole share of a GAN."""
    config, task = made("gan", worker=worker, total_steps=STEPS)
    if worker.rank == 1:
        limit_memory(task, ROOM)
    try:
        rows_in(folder, task, config, worker)
    except NoRoomError as error:
        return str(error)
    return ""


@pytest.fixture(scope="module")
def trained_by_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    for name in (*CASES, "gan"):
        (folder / name).mkdir()
    run_ranks(2, train_rank, folder)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_ranks_take_what_the_fullest_device_has_room_for_bit_for_bit(case: str, trained_by_two: Path) -> None:
    for rank in (0, 1):
        found = load_file(trained_by_two / f"{case}-{rank}.safetensors")
        assert int(found["room"]) == ROOM
        assert_equal_bits(found, load_file(trained_by_two / f"{case.split('-')[0]}-told-{rank}.safetensors"))
    assert json.loads((trained_by_two / case / KEPT).read_text()) == {"max_batch_per_device": ROOM}


@pytest.mark.parametrize("rank", [0, 1])
def test_all_ranks_refuse_what_does_not_fit_on_one(rank: int, trained_by_two: Path) -> None:
    line = (trained_by_two / f"refused-{rank}").read_text()
    assert line.startswith(f"the {SHARE} samples of a worker do not fit into the memory of cpu")
    assert not (trained_by_two / "gan" / KEPT).exists()
