"""Two ranks of the contrastive encoder equal one with the whole batch: real gloo processes, each with half of it."""

from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from components.training.batches import to_batch
from components.training.loop import Metrics, fit
from components.training.parallel import Worker, gather
from tests.distributed.gloo import run_two_ranks
from tests.tiny_text_image import contrastive_config, contrastive_task
from tests.tiny_training import assert_close, assert_equal_bits, batches, weights_of

STEPS = {"total_steps": 6}


def keep(rows: list[Tensor], step: int, metrics: Metrics) -> None:
    rows.append(torch.stack([metrics["loss"], metrics["grad_norm"]]))  # Adam alone would forgive a wrong factor


def train_rank(worker: Worker, folder: str) -> None:
    config = contrastive_config(**STEPS)
    assert gather(torch.tensor([worker.rank, 7]), worker).tolist() == [0, 7, 1, 7]
    for parts in (None, 3):
        task, rows = contrastive_task(config, worker=worker, max_batch_per_device=parts), []
        fit(task, batches(config, to_batch, worker=worker), config.optimization, log=partial(keep, rows))
        weights = {name: tensor.contiguous() for name, tensor in weights_of(task).items()}
        save_file(weights | {"metrics": torch.stack(rows)}, f"{folder}/{parts}-{worker.rank}.safetensors")


@pytest.fixture(scope="module")
def trained_by_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    run_two_ranks(train_rank, str(folder))
    return folder


def test_two_ranks_equal_one_and_see_its_loss(trained_by_two: Path) -> None:
    """A loss of each rank's own pairs would be that of an easier task."""
    torch.set_num_threads(1)
    config, rows = contrastive_config(**STEPS), []
    task = contrastive_task(config)
    fit(task, batches(config, to_batch), config.optimization, log=partial(keep, rows))
    found = load_file(trained_by_two / "None-0.safetensors")
    torch.testing.assert_close(found.pop("metrics"), torch.stack(rows), rtol=1e-3, atol=1e-4)
    assert_close(found, weights_of(task))


def test_ranks_hold_equal_weights(trained_by_two: Path) -> None:
    first, second = (load_file(trained_by_two / f"None-{rank}.safetensors") for rank in (0, 1))
    assert_equal_bits(first, second)


def test_two_ranks_that_accumulate_equal_two_that_do_not(trained_by_two: Path) -> None:
    parts, whole = (load_file(trained_by_two / f"{parts}-0.safetensors") for parts in (3, None))
    assert_close(parts, whole)
