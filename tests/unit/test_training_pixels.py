"""Laws of the training of pixel models; those that all trainings share are in test_training_tasks.py."""

import io
import math

import pytest
import torch
from PIL import Image

from components.training.batches import to_batch
from components.training.tasks.autoencoder import AutoencoderTask
from components.training.tasks.prior import PixelTask
from tests.tiny_training import DATASET_INFO, GRID, autoencoder_config, pixel_config, rows_at


def token_task(network: str, **options: object) -> PixelTask:
    return PixelTask(pixel_config(network=network, resolution=None), dataset_info=DATASET_INFO, grid=GRID, **options)


def test_the_8_bit_values_come_back_exactly():
    rows = {"image": torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1).expand(1, 16, 16, 3).numpy()}
    task = PixelTask(pixel_config(), dataset_info=DATASET_INFO)
    assert torch.equal(task.values(to_batch(rows))[0, 2].flatten(), torch.arange(256))


@pytest.mark.parametrize("network", ["pixelcnn", "row_lstm"])
def test_a_model_that_knows_nothing_needs_8_bits_a_dimension_and_log_k_a_token(network: str):
    pixels, tokens = PixelTask(pixel_config(network=network), dataset_info=DATASET_INFO), token_task(network)
    held_out = rows_at(pixels.config, range(20))
    for task, name, bits in ((pixels, "held_out_bits_per_dim", 8.0), (tokens, "held_out_bits_per_token", 4.0)):
        for parameter in task.learner.snapshot().head.out.parameters():
            parameter.data.zero_()
        assert task.evaluate(held_out) == {name: pytest.approx(bits, rel=1e-6)}


def test_bits_are_the_mean_of_all_values_however_the_images_are_split():
    task = PixelTask(pixel_config(), dataset_info=DATASET_INFO)
    held_out = rows_at(task.config, range(21))  # one full part, one of five
    batch = to_batch(held_out)
    levels = task.values(batch)
    with torch.no_grad():
        logits = task.learner.snapshot()(levels, label=batch["label"]).log_softmax(dim=-1)
    expected = -float(logits.gather(-1, levels[..., None]).mean()) / math.log(2)
    assert task.evaluate(held_out)["held_out_bits_per_dim"] == pytest.approx(expected, rel=1e-6)


def test_tokens_are_shown_through_the_tokenizer_and_not_without_one():
    tokenizer = autoencoder_config()
    autoencoder = AutoencoderTask(tokenizer).generator.snapshot()
    held_out = rows_at(tokenizer, range(12))
    assert token_task("pixelcnn").preview(held_out, 1) == {}
    shown = token_task("pixelcnn", load_tokenizer=lambda: autoencoder).preview(held_out, 1)
    assert Image.open(io.BytesIO(shown["samples"])).size == (8 * 64, 64)
