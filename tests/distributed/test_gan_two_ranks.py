"""Two ranks of the GAN equal one, batch norm included: real gloo processes, each with half of every global batch."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from components.training.batches import to_batch
from components.training.loop import fit
from components.training.parallel import Worker
from tests.distributed.gloo import run_two_ranks
from tests.tiny_training import assert_close, assert_equal_bits, batches, gan_config, make_task, rows_at, weights_of

# Without attention: in front of a batch norm its last bias has no gradient but rounding, which Adam amplifies.
CONFIG = {"total_steps": 4, "warmup_steps": 2, "discriminator_steps": 2, "attention_resolutions": ()}


def train_rank(worker: Worker, folder: str) -> None:
    config = gan_config(**CONFIG)
    task = make_task(config, worker=worker)
    fit(task, batches(config, to_batch, worker=worker), config.optimization)
    if worker.rank == 0:  # previews are rank 0's alone: they must not wait for the others
        task.preview({}, 4)
        task.evaluate(rows_at(config, range(1000, 1012)))
    weights = {name: tensor.contiguous() for name, tensor in weights_of(task).items()}
    save_file(weights, f"{folder}/{worker.rank}.safetensors")


@pytest.fixture(scope="module")
def trained_by_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    run_two_ranks(train_rank, str(folder))
    return folder


def test_two_ranks_equal_one(trained_by_two: Path) -> None:
    torch.set_num_threads(1)
    config = gan_config(**CONFIG)
    task = make_task(config)
    fit(task, batches(config, to_batch), config.optimization)
    assert_close(load_file(trained_by_two / "0.safetensors"), weights_of(task))


def test_ranks_hold_equal_weights(trained_by_two: Path) -> None:
    first, second = (load_file(trained_by_two / f"{rank}.safetensors") for rank in (0, 1))
    assert_equal_bits(first, second)
