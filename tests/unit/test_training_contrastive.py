"""Laws of the contrastive encoder's training, without Ray."""

import pytest
import torch

from components.configuration.conditions import DatasetInfo
from components.training.batches import to_batch
from components.training.randomness import mirrored, shifted
from tests.tiny_text_image import contrastive_config
from tests.tiny_training import assert_equal_bits, batches, make_task, rows_at, weights_of


def test_training_moves_every_weight_and_learns_pairs_by_heart() -> None:
    config = contrastive_config(total_steps=60, warmup_steps=2, max_shift=0, learning_rate=5e-3)
    task = make_task(config)
    before, batch, losses = weights_of(task), next(batches(config, to_batch)), []
    for step in range(1, config.optimization.total_steps + 1):
        losses.append(float(task.train_step(batch, step)["loss"]))
    after = weights_of(task)
    assert not [name for name in before if "network." in name and torch.equal(before[name], after[name])]
    assert losses[-1] < 0.1 * losses[0]
    rows = rows_at(config, range(config.optimization.global_batch_size))
    metrics = task.evaluate({name: rows[name] for name in ("image", "text")})
    assert metrics["held_out_image_to_text"] == metrics["held_out_text_to_image"] == 1
    assert task.evaluate(rows) == task.evaluate(rows)


def test_a_non_finite_batch_changes_nothing() -> None:
    task = make_task(contrastive_config())
    batch = next(batches(task.config, to_batch))
    before = weights_of(task)
    task.train_step(batch | {"image": batch["image"] * float("nan")}, 1)
    assert_equal_bits(weights_of(task), before)


def test_a_set_without_captions_is_refused() -> None:
    with pytest.raises(ValueError, match="this set has none"):
        contrastive_config().network_arguments(DatasetInfo(num_classes=3))


def test_shifts_move_each_image_by_its_position_and_repeat_its_edge() -> None:
    image = torch.arange(2 * 3 * 6 * 6.0).reshape(2, 3, 6, 6).repeat(8, 1, 1, 1)
    position = torch.arange(16)
    moved = shifted(image, position, seed=1, max_shift=2)
    assert torch.equal(shifted(image[5:7], position[5:7], seed=1, max_shift=2), moved[5:7])
    assert len({tuple(row.flatten().tolist()) for row in moved[::2]}) > 3  # not all by the same
    for before, after in zip(image, moved, strict=True):
        padded = torch.nn.functional.pad(before, [2] * 4, mode="replicate")
        windows = [padded[:, y : y + 6, x : x + 6] for y in range(5) for x in range(5)]
        assert any(torch.equal(after, window) for window in windows)
    assert shifted(image, position, seed=1, max_shift=0) is image


def test_mirroring_takes_about_half_of_the_images() -> None:
    image = torch.randn(200, 1, 2, 2)
    moved = mirrored(image, torch.arange(200), seed=1)
    flipped = (moved == image.flip(3)).flatten(1).all(1)
    assert torch.equal(moved[~flipped], image[~flipped])
    assert 60 < int(flipped.sum()) < 140
