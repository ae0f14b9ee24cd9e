"""Two ranks equal one: real gloo processes, each with half of every global batch."""

import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file

from components.training.batches import to_batch
from components.training.loop import fit
from components.training.parallel import Worker
from tests.tiny_training import (
    KINDS,
    assert_close,
    assert_equal_bits,
    batches,
    config_of,
    make_task,
    weights_of,
)

STEPS = 6


def config_without_dropout(kind: str):  # dropped units depend on the rank
    changes = {"total_steps": STEPS, "global_batch_size": 8}
    return config_of(kind, **changes, **({} if kind in ("tokenizer", "dit") else {"dropout": 0.0}))


def train_rank(rank: int, port: int, folder: str, kinds: tuple[str, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    worker = Worker(rank, 2, torch.device("cpu"))
    for kind in kinds:
        for parts in (None, 3):
            config = config_without_dropout(kind)
            task = make_task(config, worker=worker, max_batch_per_device=parts)
            fit(task, batches(config, to_batch, worker=worker), config.optimization)
            weights = {name: tensor.contiguous() for name, tensor in weights_of(task).items()}
            save_file(weights, f"{folder}/{kind}-{parts}-{rank}.safetensors")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def trained_by_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(train_rank, args=(port, str(folder), KINDS), nprocs=2)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_equal_one(kind: str, trained_by_two: Path) -> None:
    torch.set_num_threads(1)
    config = config_without_dropout(kind)
    task = make_task(config)
    fit(task, batches(config, to_batch), config.optimization)
    assert_close(load_file(trained_by_two / f"{kind}-None-0.safetensors"), weights_of(task))


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_hold_equal_weights(kind: str, trained_by_two: Path) -> None:
    first, second = (load_file(trained_by_two / f"{kind}-None-{rank}.safetensors") for rank in (0, 1))
    assert_equal_bits(first, second)


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_that_accumulate_equal_two_that_do_not(kind: str, trained_by_two: Path) -> None:
    parts, whole = (load_file(trained_by_two / f"{kind}-{parts}-0.safetensors") for parts in (3, None))
    assert_close(parts, whole)
