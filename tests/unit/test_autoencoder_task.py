"""Laws of training an autoencoder, for each bottleneck: VAE, VAE-GAN, VQ-VAE, dVAE, FSQ."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from components.models.autoencoder import Autoencoder
from components.models.bundle import ModelBundle, load_bundle, save_bundle
from components.models.losses.reconstruction import reconstruction_loss
from components.sampling.images import to_uint8
from components.training.batches import to_batch
from components.training.learner import DISCRIMINATORS
from components.training.loop import fit
from components.training.optim import kl_weight_at, temperature_at
from components.training.tasks.autoencoder import AutoencoderTask
from tests.tiny_autoencoders import RECIPES, config_of
from tests.tiny_training import autoencoder_config, batches, rows_at, weights_of

GAUSSIAN = ("vae", "vae_gan")


@pytest.mark.parametrize("classes", [3, 7])
def test_maps_of_classes_are_learned_by_the_cross_entropy_of_planes_and_come_back_as_classes(
    classes: int,
) -> None:
    """Of three classes too, whose planes are as many as colors. An untrained answer costs ln 2 a plane."""
    config = config_of("vq_vae", reconstruction="classes", image_channels=classes, member="mask", total_steps=150)
    values = np.random.default_rng(0).integers(classes, size=(4, 2, 2)).repeat(4, axis=1).repeat(4, axis=2)
    gray = np.rint(255 * values / (classes - 1)).astype(np.uint8)
    rows = rows_at(config, range(4)) | {"image": np.repeat(gray[..., None], 3, axis=3)}
    task, batch = AutoencoderTask(config), to_batch(rows)
    network = task.generator.network
    planes = network.planes(batch["image"])
    assert torch.equal(planes.argmax(dim=1), torch.from_numpy(values))
    zero = reconstruction_loss(torch.zeros_like(planes), image=planes, kind="classes")
    assert float(zero) == pytest.approx(math.log(2))
    output = network(batch["image"])[0].detach()
    oracle = -torch.where(planes == 1, output, -output).sigmoid().log().mean()
    assert float(reconstruction_loss(output, image=planes, kind="classes")) == pytest.approx(float(oracle), rel=1e-5)
    for step in range(1, 151):
        task.train_step(batch, step)
    made = to_uint8(task.generator.network.reconstruct(batch["image"]))
    assert (made == rows["image"]).mean() > 0.8
    assert set(np.unique(made)) <= set(np.unique(np.rint(255 * np.arange(classes) / (classes - 1))))
    assert all(each.shape[1:] == (3, 8, 8) for rows in task.shown(iter([batch])) for each in rows)
    assert task.evaluate(rows)["held_out_reconstruction_loss"] > 0


@pytest.mark.parametrize("name", ["dvae", "vq_vae"])
def test_codes_start_as_features_of_the_first_batch_and_only_then(name: str) -> None:
    """With updates too small to see, the codes in use after a step are those of an untrained encoder's neighbors."""
    config = config_of(name, learning_rate=1e-12, warmup_steps=0)
    task, batch = AutoencoderTask(config), next(batches(config, to_batch))
    before = task.generator.network.tokenize(batch["image"]).unique()
    task.train_step(batch, 1)
    network = task.generator.network
    started, after = network.bottleneck.codebook.clone(), network.tokenize(batch["image"]).unique()
    task.train_step(batch, 2)
    assert len(after) > len(before)
    torch.testing.assert_close(network.bottleneck.codebook, started, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", RECIPES)
def test_a_network_of_a_loss_without_weight_is_not_loaded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(name, perceptual_network="efficientnet_lite1", perceptual_weight=0.0)
    wanted = config.losses.adversarial_weight > 0
    if not wanted:
        monkeypatch.delitem(DISCRIMINATORS, "autoencoder")
    task = AutoencoderTask(config)
    assert task.perceptual is None
    metrics = task.train_step(next(batches(config, to_batch)), 1)
    assert any("discriminator" in key for key in task.state_dict()["weights"]) == wanted
    assert ("discriminator_loss" in metrics) == wanted
    assert ("discriminator" in task.state_dict()) == wanted


def test_the_discriminator_learns_from_the_first_step_and_the_generator_hears_it_later() -> None:
    """Until it hears it, the generator has the bits of one that never does."""
    heard, deaf = (autoencoder_config(discriminator_start=start, total_steps=20) for start in (2, 20))
    tasks = [AutoencoderTask(config) for config in (heard, deaf)]
    untrained = {name: tensor for name, tensor in weights_of(tasks[0]).items() if name.startswith("discriminator")}
    for step, batch in zip((1, 2, 3), batches(heard, to_batch), strict=False):
        for task in tasks:
            task.train_step(batch, step)
        first, second = (weights_of(task) for task in tasks)
        if step == 1:
            assert not any(torch.equal(first[name], tensor) for name, tensor in untrained.items())
        same = [torch.equal(first[name], second[name]) for name in first if name.startswith("generator.network")]
        assert all(same) == (step <= 2)


@pytest.mark.parametrize("name", RECIPES)
def test_evaluation_names_what_the_model_has(name: str) -> None:
    config = config_of(name)
    task, held_out = AutoencoderTask(config), rows_at(config, range(1000, 1012))
    found = task.evaluate(held_out)
    assert "held_out_reconstruction_loss" in found
    assert ("held_out_codebook_usage" in found) == (name not in GAUSSIAN)
    assert ("held_out_kl_loss" in found) == (name in (*GAUSSIAN, "dvae"))
    assert ("held_out_bits_per_dim" in found) == (config.network.reconstruction == "discretized_logistic")
    (image,) = task.preview(held_out, 1).values()
    assert image.startswith(b"\x89PNG")


@pytest.mark.parametrize("name", RECIPES)
def test_a_kept_model_rebuilds_itself(name: str, tmp_path: Path) -> None:
    config = config_of(name, total_steps=5)
    task = AutoencoderTask(config)
    fit(task, batches(config, to_batch), config.optimization)
    network = task.generator.snapshot()
    save_bundle(tmp_path, ModelBundle("autoencoder", config.network_arguments(), {"resolution": 8}, network))
    loaded = load_bundle(tmp_path).module
    assert isinstance(loaded, Autoencoder)
    image = torch.rand(2, 3, 8, 8) * 2 - 1
    back = network.reconstruct(image)
    assert back.shape == image.shape
    torch.testing.assert_close(loaded.reconstruct(image), back)
    if name in GAUSSIAN:
        for refused in (lambda: loaded.tokenize(image), lambda: loaded.codebook_size):
            with pytest.raises(ValueError, match="has no tokens"):
                refused()
    else:
        indices = loaded.tokenize(image)
        assert indices.shape == (2, *loaded.grid)
        assert 0 <= indices.min() <= indices.max() < loaded.codebook_size
        torch.testing.assert_close(loaded.detokenize(indices), back)


def coin_images(positions: range) -> dict[str, np.ndarray]:
    """Every value of every pixel is 0 or 255 by the toss of a coin: exactly one bit a dimension."""
    heads = [np.random.default_rng(position).integers(0, 2, (8, 8, 3)) for position in positions]
    return {"image": (255 * np.stack(heads)).astype(np.uint8), "position": np.array(positions)}


def test_the_bound_of_a_vae_is_above_the_entropy_of_its_data_and_comes_near_it() -> None:
    config = config_of("vae", total_steps=150, learning_rate=2e-2, global_batch_size=16, max_grad_norm=9.0)
    task = AutoencoderTask(config)
    held_out = coin_images(range(10_000, 10_064))
    before = task.evaluate(held_out)["held_out_bits_per_dim"]
    for step in range(1, config.optimization.total_steps + 1):
        task.train_step(to_batch(coin_images(range(16 * step, 16 * (step + 1)))), step)
    after = task.evaluate(held_out)["held_out_bits_per_dim"]
    assert before > 1.2
    assert 0.998 < after < 1.06


def test_bits_per_dim_of_codes_counts_log_k_for_each() -> None:
    bits = AutoencoderTask(config_of("vq_vae_ema")).bits_per_dim({"reconstruction_loss": 0.0})
    assert bits == pytest.approx(16 * 4 / (3 * 64))  # 16 codes of 4 bits for 192 values


def test_weights_and_temperature_follow_their_schedules() -> None:
    config = config_of("dvae", kl_weight=6.0, kl_warmup_steps=10, temperature_steps=100).losses
    assert [round(kl_weight_at(config, step), 9) for step in (0, 5, 10, 11)] == [0.0, 3.0, 6.0, 6.0]
    assert temperature_at(config, 0) == 1.0
    assert temperature_at(config, 50) == pytest.approx((1 + 1 / 16) / 2)
    assert temperature_at(config, 100) == temperature_at(config, 10_000) == 1 / 16
    assert config_of("vae").losses.kl_weight == kl_weight_at(config_of("vae").losses, 1) == 1.0


def test_kl_is_weighted_so_that_the_loss_of_a_vae_is_its_bound_a_dimension() -> None:
    config = config_of("vae")
    metrics = AutoencoderTask(config).train_step(next(batches(config, to_batch)), 1)
    expected = metrics["reconstruction_loss"] + metrics["kl_loss"] / (3 * 8 * 8)
    torch.testing.assert_close(metrics["loss"], expected)


def test_a_model_of_another_version_is_refused_in_one_line(tmp_path: Path) -> None:
    config = config_of("vq_vae")
    flat = config.network_arguments() | {"codebook_size": 16}
    save_bundle(tmp_path, ModelBundle("autoencoder", flat, {}, AutoencoderTask(config).generator.snapshot()))
    said = r"model\.json: a network autoencoder of another version .*'codebook_size'"
    with pytest.raises(ValueError, match=said) as caught:
        load_bundle(tmp_path)
    assert "\n" not in str(caught.value)
