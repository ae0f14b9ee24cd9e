"""Two ranks equal one: real gloo processes, each with half of every global batch."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from components.training.batches import to_batch
from components.training.loop import fit
from components.training.parallel import Worker
from tests.distributed.gloo import run_two_ranks
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


def train_rank(worker: Worker, folder: str, kinds: tuple[str, ...]) -> None:
    for kind in kinds:
        for parts in (None, 3):
            config = config_without_dropout(kind)
            task = make_task(config, worker=worker, max_batch_per_device=parts)
            fit(task, batches(config, to_batch, worker=worker), config.optimization)
            weights = {name: tensor.contiguous() for name, tensor in weights_of(task).items()}
            save_file(weights, f"{folder}/{kind}-{parts}-{worker.rank}.safetensors")


@pytest.fixture(scope="module")
def trained_by_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    run_two_ranks(train_rank, str(folder), KINDS)
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
