"""Laws of the priors' trainings: what is dropped, corrupted and learned, and inputs that do not fit."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from components.configuration.trainings import MaskedPriorTraining, PriorTraining
from components.data.listing import TokensError
from components.data.tokens import check_tokenizer
from components.models.transformer import Transformer
from components.runtime.storage.store import Store
from components.training.batches import to_batch
from components.training.loop import Batch
from components.training.randomness import dropped_conditions
from components.training.tasks.prior import PriorTask, learned_text
from tests.tiny_training import (
    CONDITION,
    DATASET_INFO,
    GRID,
    batches,
    make_task,
    masked_prior_config,
    prior_config,
    rows_at,
)
from tests.token_sets import token_set, write_token_set

EVERYTHING: dict[str, Any] = {"conditions": ("label", "text", "condition"), "dropout": 0.0}


def batch_at(config: Any, positions: range) -> Batch:
    return to_batch(rows_at(config, positions))


@pytest.mark.parametrize("make_config", [prior_config, masked_prior_config])
def test_a_dropped_condition_image_is_the_null_token_everywhere(make_config: Any) -> None:
    config = make_config(conditions=("label", "condition"), cond_drop_prob=0.5)
    batch = batch_at(config, range(200))
    assert 0 <= batch["condition"].min() <= batch["condition"].max() < CONDITION.codebook_size
    mixed = dropped_conditions(batch, config.conditioning, DATASET_INFO, seed=5)
    dropped = mixed["label"] == DATASET_INFO.num_classes
    assert 60 < dropped.sum() < 140
    assert (mixed["condition"][dropped] == CONDITION.codebook_size).all()
    assert torch.equal(mixed["condition"][~dropped], batch["condition"][~dropped])
    independently = config.replace(cond_drop="independent").conditioning
    independent = dropped_conditions(batch, independently, DATASET_INFO, seed=5)
    assert not torch.equal(independent["condition"][:, 0] == CONDITION.codebook_size, independent["label"] == 3)


def test_corruption_replaces_inputs_by_random_tokens_from_seed_and_position_alone() -> None:
    config = prior_config(token_corruption=0.3)
    task = make_task(config)
    assert isinstance(task, PriorTask)
    batch = batch_at(config, range(2000))
    original = batch["tokens"].clone()
    corrupted = task.corrupted(batch)
    assert torch.equal(batch["tokens"], original), "targets stay"
    changed = corrupted != original
    assert float(changed.float().mean()) == pytest.approx(0.3 * 15 / 16, abs=0.02)
    assert torch.bincount(corrupted[changed], minlength=16).float().std() < 40
    assert torch.equal(task.corrupted(batch_at(config, range(70, 90))), corrupted[70:90])
    assert torch.equal(make_task(prior_config()).corrupted(batch), original)


def test_corrupted_inputs_are_learned_from_and_not_evaluated_on() -> None:
    plain, corrupted = make_task(prior_config()), make_task(prior_config(token_corruption=0.9))
    batch, held_out = batch_at(prior_config(), range(8)), rows_at(prior_config(), range(1000, 1012))
    assert plain.evaluate(held_out) == corrupted.evaluate(held_out)
    losses = [float(task.train_step(batch, 1)["loss"]) for task in (plain, corrupted)]
    assert losses[0] != losses[1]


def test_a_dropped_text_is_not_learned() -> None:
    text = torch.tensor([[1, 7, 9, 2], [1, 5, 2, 0], [1, 2, 0, 0]])
    dropped = torch.tensor([[1, 7, 9, 2], [1, 2, 0, 0], [1, 2, 0, 0]])
    assert learned_text(dropped, original=text).tolist() == [[1, 7, 9, 2], [0, 0, 0, 0], [1, 2, 0, 0]]


def test_text_and_image_share_the_loss_by_the_weight() -> None:
    config = prior_config(**EVERYTHING, text_loss_weight=0.125)
    metrics = {name: float(value) for name, value in make_task(config).train_step(next(stream(config)), 1).items()}
    image, text = (metrics[name] * np.log(2) for name in ("bits_per_token", "text_bits_per_token"))
    assert metrics["loss"] == pytest.approx(0.875 * image + 0.125 * text, rel=1e-5)
    without = make_task(prior_config()).train_step(next(stream(config)), 1)
    assert "text_bits_per_token" not in without


def stream(config: Any) -> Any:
    return batches(config, to_batch)


@pytest.mark.parametrize("positions", ["learned", "learned_2d", "rotary_2d"])
def test_a_prior_with_everything_learns_texts_and_images_and_tells_both_apart(positions: str) -> None:
    numbers = {"positions": positions, "text_loss_weight": 0.125, "token_corruption": 0.1, "total_steps": 40}
    config = prior_config(**EVERYTHING | numbers | {"learning_rate": 1e-2})
    task, batch = make_task(config), next(stream(config))
    held_out = rows_at(config, range(8))
    before = task.evaluate(held_out)
    for step in range(1, 41):
        task.train_step(batch, step)
    after = task.evaluate(held_out)
    assert before.keys() == after.keys() == {"held_out_bits_per_token", "held_out_text_bits_per_token"}
    assert all(after[name] < 0.9 * before[name] for name in before)


def test_accumulation_equals_no_accumulation_with_texts_and_corruption() -> None:
    config = prior_config(**EVERYTHING, text_loss_weight=0.5, token_corruption=0.2, cond_drop_prob=0.5)
    whole, parts = make_task(config), make_task(config, max_batch_per_device=3)
    for step, batch in zip(range(1, 4), stream(config), strict=False):
        one, other = whole.train_step(batch, step), parts.train_step(batch, step)
        for name in one:
            torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=1e-5)


def test_held_out_bits_of_a_text_are_those_of_its_tokens_together() -> None:
    config = prior_config(conditions=("text",), text_loss_weight=0.5)
    task, held_out = make_task(config), rows_at(config, range(40))
    held_out["text"][:20, 2:] = 0
    held_out["text"][:20, 1] = 2  # half of the texts are empty: one token to learn instead of four
    network: Any = task.learner.snapshot()
    batch = to_batch(held_out)
    logits: Tensor = network(batch["tokens"], text=batch["text"], with_text=True).text
    log_p = logits.log_softmax(dim=-1).gather(-1, batch["text"][:, 1:, None])[..., 0]
    real = batch["text"][:, 1:] != 0
    expected = -float(log_p[real].mean()) / np.log(2)
    assert task.evaluate(held_out)["held_out_text_bits_per_token"] == pytest.approx(expected, rel=1e-5)


def test_the_arguments_rebuild_the_network_from_plain_values() -> None:
    config = prior_config(**EVERYTHING, positions="learned_2d", text_loss_weight=0.1)
    network = Transformer(**config.network_arguments(DATASET_INFO, GRID))
    assert network.grid == (GRID.height, GRID.width)
    assert network.condition_grid == (1, 2)
    assert network.null_condition == CONDITION.codebook_size
    assert network.text_head.out_features == DATASET_INFO.vocab_size


def test_the_kind_of_network_is_part_of_the_numbers() -> None:
    assert PriorTraining.model_validate(prior_config().model_dump()) == prior_config()
    with pytest.raises(ValueError, match="network"):
        MaskedPriorTraining.model_validate(masked_prior_config().model_dump() | {"network": "transformer"})


def test_inputs_that_do_not_fit_are_named_in_one_line(tmp_path: Path) -> None:
    tokens = write_token_set(Store(str(tmp_path)), [token_set(0, 30)])
    check_tokenizer(tokens, codebook_size=512, grid=(2, 2))
    with pytest.raises(TokensError, match="the tokens have a codebook of 512, the tokenizer one of 1024"):
        check_tokenizer(tokens, codebook_size=1024, grid=(2, 2))
    with pytest.raises(TokensError, match="the tokens have a grid of 2×2, the tokenizer one of 4×4"):
        check_tokenizer(tokens, codebook_size=512, grid=(4, 4))
