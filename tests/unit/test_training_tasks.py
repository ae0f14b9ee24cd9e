"""Laws of a training run, held by each task without Ray."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from components.training.batches import to_batch
from components.training.loop import Task, fit
from components.training.optim import NonFiniteError
from tests.tiny_training import (
    KINDS,
    assert_close,
    assert_equal_bits,
    batches,
    config_of,
    make_task,
    rows_at,
    weights_of,
)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def trained(config: Any, **options: Any) -> Task:
    task = make_task(config, **options)
    fit(task, batches(config, to_batch), config.optimization)
    return task


@pytest.mark.parametrize("kind", KINDS)
def test_training_moves_every_weight_and_lowers_the_loss(kind: str) -> None:
    plain = {} if kind == "dit" else {"dropout": 0.0}
    config = config_of(kind) if kind == "tokenizer" else config_of(kind, total_steps=40, warmup_steps=2, **plain)
    task = make_task(config)
    before, losses = weights_of(task), []
    batch = next(batches(config, to_batch))
    for step in range(1, config.optimization.total_steps + 1):
        losses.append(float(task.train_step(batch, step)["loss"]))
    after = weights_of(task)
    still = [name for name in before if torch.equal(before[name], after[name])]
    assert not [name for name in still if "network." in name], still
    if kind != "tokenizer":  # its loss has a moving adversary
        assert sum(losses[-5:]) < 0.95 * sum(losses[:5])


@pytest.mark.parametrize("kind", KINDS)
def test_accumulation_equals_no_accumulation(kind: str) -> None:
    config = config_of(kind, total_steps=6, **({} if kind in ("tokenizer", "dit") else {"dropout": 0.0}))
    whole, parts = trained(config), trained(config, max_batch_per_device=3)
    assert_close(weights_of(parts), weights_of(whole))


@pytest.mark.parametrize("kind", KINDS)
def test_previews_and_evaluation_leave_training_as_it_is(kind: str) -> None:
    config = config_of(kind)
    undisturbed, task = trained(config), make_task(config)
    held_out = rows_at(config, range(1000, 1012))

    def show(step: int, shown: Task) -> None:
        shown.preview(held_out, step)
        shown.evaluate(held_out)

    fit(task, batches(config, to_batch), config.optimization, show=show)
    assert_equal_bits(weights_of(task), weights_of(undisturbed))


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_repeats_itself_and_previews_are_images(kind: str, tmp_path: Path) -> None:
    config = config_of(kind)
    task, held_out = make_task(config), rows_at(config, range(1000, 1012))
    assert task.evaluate(held_out) == task.evaluate(held_out)
    for name, png in task.preview(held_out, 1).items():
        (tmp_path / f"{name}.png").write_bytes(png)
        assert Image.open(tmp_path / f"{name}.png").size[0] == 8 * 64


@pytest.mark.parametrize("kind", KINDS)
def test_a_single_non_finite_batch_changes_nothing_and_several_stop_the_run(kind: str) -> None:
    config = config_of(kind)
    task = make_task(config)
    batch = next(batches(config, to_batch))
    task.train_step(batch, 1)
    before = weights_of(task)
    poison_weights(task)
    task.train_step(batch, 2)
    heal_weights(task, before)
    assert_equal_bits(weights_of(task), before)
    poison_weights(task)
    with pytest.raises(NonFiniteError, match="lower learning_rate"):
        fit(task, batches(config, to_batch), config.optimization)


def poison_weights(task: Task) -> None:
    """Make one tensor of the network infinite: the loss and all gradients are then NaN."""
    with torch.no_grad():
        next(iter(learner(task).network.parameters())).fill_(float("inf"))


def heal_weights(task: Task, weights: dict[str, torch.Tensor]) -> None:
    prefix = "generator.network." if hasattr(task, "generator") else "network."
    first = next(iter(learner(task).network.named_parameters()))
    with torch.no_grad():
        first[1].copy_(weights[prefix + first[0]])


def learner(task: Task) -> Any:
    return task.generator if hasattr(task, "generator") else task.learner
