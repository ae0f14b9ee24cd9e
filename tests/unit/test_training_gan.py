"""Laws of the GAN's training, without Ray."""

from io import BytesIO
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from components.models.bundle import ModelBundle, load_bundle, save_bundle
from components.models.gan import ConditionalBatchNorm2d, GANGenerator, batch_moments, settle_spectral_norms
from components.models.losses.adversarial import generator_loss, hinge_discriminator_loss
from components.training.batches import to_batch
from components.training.learner import below
from components.training.loop import fit
from components.training.parallel import Worker
from components.training.tasks.gan import GANTask
from tests.tiny_training import DATASET_INFO, batches, gan_config, make_task, rows_at, weights_of


def trained(**changes: object) -> GANTask:
    config = gan_config(**changes)
    task = make_task(config)
    fit(task, batches(config, to_batch), config.optimization)
    return task


@pytest.mark.parametrize("shared_dim", [None, 5])
def test_training_moves_every_weight_of_both_networks(shared_dim: int | None) -> None:
    config = gan_config(shared_dim=shared_dim)
    task = make_task(config)
    before = weights_of(task)
    fit(task, batches(config, to_batch), config.optimization)
    after = weights_of(task)
    still = {name for name in before if torch.equal(before[name], after[name])}
    # Statistics are estimated for the average only, and a matrix of one row has one left singular vector.
    unused = {f"generator.network.{name}" for name in statistics_of(task.generator.network)}
    assert still == unused | {"discriminator.network.logit.parametrizations.weight.0._u"}


def statistics_of(network: GANGenerator) -> list[str]:
    norms = [name for name, module in network.named_modules() if isinstance(module, ConditionalBatchNorm2d)]
    return [f"{name}.{buffer}" for name in norms for buffer in ("mean", "var")]


def test_the_discriminator_learns_to_tell_images_from_noise() -> None:
    config = gan_config(learning_rate=1e-6, total_steps=60, augment=False)
    task = make_task(config)
    losses = []
    fit(
        task,
        batches(config, to_batch),
        config.optimization,
        log=lambda _, metrics: losses.append(float(metrics["loss"])),
    )
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_the_metrics_are_the_hinge_losses_of_the_logits() -> None:
    """A discriminator that says the same of all images: losses in closed form."""
    task = make_task(gan_config(discriminator_steps=1))
    network = task.discriminator.network
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "bias" in name and "blocks" in name:
                parameter.zero_()
        network.logit.bias.fill_(0.25)
    batch = next(batches(task.config, to_batch))
    batch["image"] = torch.zeros_like(batch["image"])
    for block in network.blocks:
        block.register_forward_hook(lambda module, inputs, output: 0 * output)  # phi = 0
    metrics = task.train_step(batch, 1)
    logits = torch.full((8,), 0.25)
    torch.testing.assert_close(metrics["real_logits"], torch.tensor(0.25))
    torch.testing.assert_close(metrics["fake_logits"], torch.tensor(0.25))
    torch.testing.assert_close(metrics["discriminator_loss"], hinge_discriminator_loss(logits, fake_logits=logits))
    # One step of Adam, at a quarter of the peak rate, has moved the bias in between.
    assert abs(float(metrics["generator_loss"]) - float(generator_loss(logits))) < 2e-3


def test_a_preview_has_a_row_for_each_class(tmp_path: Path) -> None:
    task = trained(total_steps=6)
    held_out = rows_at(task.config, range(1000, 1012))
    (tmp_path / "samples.png").write_bytes(task.preview(held_out, 1)["samples"])
    assert Image.open(tmp_path / "samples.png").size == (8 * 64, DATASET_INFO.num_classes * 64)


def test_a_batch_in_equal_parts_gives_the_loss_and_the_gradients_of_the_whole() -> None:
    """Where batch norm has the same statistics in each part, and singular vectors have settled."""
    config = gan_config(augment=False)
    once = to_batch(rows_at(config, range(4)))
    batch = {name: torch.cat([value] * 3) for name, value in once.items()}
    found = []
    for max_batch in (None, 4):
        task = make_task(config, max_batch_per_device=max_batch)
        for learner in (task.generator, task.discriminator):
            settle_spectral_norms(learner.network)
        losses = {**task.train_discriminator(batch, 1), "generator_loss": task.train_generator(batch, 1)}
        networks = {"generator": task.generator.network, "discriminator": task.discriminator.network}
        gradients = {
            f"{network}.{name}": parameter.grad
            for network, module in networks.items()
            for name, parameter in module.named_parameters()
        }
        found.append(losses | gradients)
    whole, parts = found
    torch.testing.assert_close(parts, whole, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("shared_dim", [None, 5])
def test_what_a_bundle_holds_samples_as_the_task_does(tmp_path: Path, shared_dim: int | None) -> None:
    """The weights of a checkpoint are those of the average, with statistics and singular vectors of its own."""
    task = trained(total_steps=6, shared_dim=shared_dim)
    save_file(
        {name: tensor.contiguous() for name, tensor in weights_of(task).items()}, tmp_path / "weights.safetensors"
    )
    weights = below("generator.ema.", load_file(tmp_path / "weights.safetensors"))
    arguments = task.config.network_arguments(DATASET_INFO)
    network = GANGenerator(**arguments)
    network.load_state_dict(weights)
    save_bundle(tmp_path, ModelBundle("gan", arguments, {"resolution": 8}, network))
    bundle = load_bundle(tmp_path)
    noise, label = torch.randn(5, 6), torch.tensor([0, 1, 2, 0, 1])
    torch.testing.assert_close(bundle.module(noise, label), task.finish()(noise, label))
    batch = next(iter(task.statistics_noise()))
    assert bundle.module(*batch).std() > 1e-3


def test_the_finished_generator_has_the_statistics_of_the_fixed_noise() -> None:
    """Exactly, where no norm stands before: those of all of its batches together."""
    task = trained(total_steps=6)
    network = task.finish()
    noise = torch.cat([noise for noise, _ in task.statistics_noise()])
    features = network.project(noise).reshape(len(noise), -1, 2, 2)
    first = network.blocks[0].norm_1
    torch.testing.assert_close(torch.stack([first.mean, first.var]), batch_moments(features))


def test_the_generator_without_classes_trains() -> None:
    task = trained(conditions=(), total_steps=6)
    assert task.finish().num_classes is None
    assert Image.open(BytesIO(task.preview({}, 1)["samples"])).size == (8 * 64, 64)


def test_a_share_that_the_discriminators_steps_do_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="multiple of discriminator_steps 4 times the 4 workers"):
        make_task(gan_config(discriminator_steps=4), worker=Worker(0, 4))
