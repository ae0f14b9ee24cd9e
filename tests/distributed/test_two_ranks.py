"""Two ranks equal one: real gloo processes, each with half of every global batch."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from components.training.batches import to_batch
from components.training.loop import Metrics, fit
from components.training.parallel import ALONE, Worker, gather
from tests.distributed.gloo import run_ranks
from tests.tiny_autoencoders import RECIPES
from tests.tiny_training import KINDS, assert_close, assert_equal_bits, batches, rows_at, weights_of
from tests.trained_networks import made

STEPS: dict[str, Any] = {"total_steps": 6}
# Without attention: in front of a batch norm its last bias has no gradient but rounding, which Adam amplifies.
GAN: dict[str, Any] = {"total_steps": 4, "warmup_steps": 2, "discriminator_steps": 2, "attention_resolutions": ()}
IN_PARTS = (*KINDS, "contrastive")  # that take a batch in parts, too
CASES = (*IN_PARTS, "gan", *RECIPES)  # batch norm, codebooks and noise that belongs to the sample are among them


def trained(case: str, worker: Worker = ALONE, parts: int | None = None) -> dict[str, Tensor]:
    """Weights after the last step; losses and norms of a contrastive one: Adam alone would forgive a wrong factor."""
    config, task = made(case, worker=worker, parts=parts, **(GAN if case == "gan" else STEPS))
    rows: list[Tensor] = []
    watch = {"log": partial(keep, rows)} if case == "contrastive" else {}
    fit(task, batches(config, to_batch, worker=worker), config.optimization, **watch)
    if case == "gan" and worker.rank == 0 and worker.world_size > 1:  # rank 0's alone: it must not wait for the others
        task.preview({}, 4)
        task.evaluate(rows_at(config, range(1000, 1012)))
    weights = {name: tensor.contiguous() for name, tensor in weights_of(task).items()}
    if getattr(task, "history", None) is not None:  # of loss-aware times: the last losses, in order
        weights["history"] = task.history.losses
    return weights | ({"metrics": torch.stack(rows)} if rows else {})


def keep(rows: list[Tensor], step: int, metrics: Metrics) -> None:
    rows.append(torch.stack([metrics["loss"], metrics["grad_norm"]]))


def train_rank(worker: Worker, folder: str) -> None:
    assert gather(torch.tensor([worker.rank, 7]), worker).tolist() == [0, 1, 7, 7]
    for case in CASES:
        for parts in (None, 3) if case in IN_PARTS else (None,):
            save_file(trained(case, worker, parts), f"{folder}/{case}-{parts}-{worker.rank}.safetensors")


@pytest.fixture(scope="module")
def by_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    run_ranks(2, train_rank, str(folder))
    return folder


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_equal_one(case: str, by_two: Path) -> None:
    """The contrastive loss too: one of each rank's own pairs would be that of an easier task."""
    torch.set_num_threads(1)
    two, one = load_file(by_two / f"{case}-None-0.safetensors"), trained(case)
    if "metrics" in one:
        torch.testing.assert_close(two["metrics"], one.pop("metrics"), rtol=1e-3, atol=1e-4)
    assert_close(two, one)


@pytest.mark.parametrize("case", CASES)
def test_ranks_hold_equal_weights(case: str, by_two: Path) -> None:
    first, second = (load_file(by_two / f"{case}-None-{rank}.safetensors") for rank in (0, 1))
    assert_equal_bits(first, second)


@pytest.mark.parametrize("case", IN_PARTS)
def test_two_ranks_that_accumulate_equal_two_that_do_not(case: str, by_two: Path) -> None:
    parts, whole = (load_file(by_two / f"{case}-{parts}-0.safetensors") for parts in (3, None))
    assert_close(parts, whole)
