"""Two ranks equal one for each bottleneck: noise belongs to the sample, codebooks to all ranks."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from components.training.batches import to_batch
from components.training.loop import fit
from components.training.parallel import ALONE, Worker
from components.training.tasks.autoencoder import AutoencoderTask
from tests.distributed.gloo import run_two_ranks
from tests.tiny_autoencoders import RECIPES, config_of
from tests.tiny_training import assert_close, assert_equal_bits, batches, weights_of

STEPS = 6


def trained(name: str, worker: Worker) -> dict[str, torch.Tensor]:
    config = config_of(name, total_steps=STEPS)
    task = AutoencoderTask(config, worker=worker)
    fit(task, batches(config, to_batch, worker=worker), config.optimization)
    return weights_of(task)


def train_rank(worker: Worker, folder: str) -> None:
    for name in RECIPES:
        weights = trained(name, worker)
        save_file(
            {key: tensor.contiguous() for key, tensor in weights.items()}, f"{folder}/{name}-{worker.rank}.safetensors"
        )


@pytest.fixture(scope="module")
def trained_by_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    run_two_ranks(train_rank, str(folder))
    return folder


@pytest.mark.parametrize("name", RECIPES)
def test_two_ranks_hold_equal_weights_and_equal_one(name: str, trained_by_two: Path) -> None:
    torch.set_num_threads(1)
    first, second = (load_file(trained_by_two / f"{name}-{rank}.safetensors") for rank in (0, 1))
    assert_equal_bits(first, second)
    assert_close(first, trained(name, ALONE))
