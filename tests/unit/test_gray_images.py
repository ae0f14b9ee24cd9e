"""Laws of models of one channel: they learn, sample and are measured on gray images, and refuse color in one line."""

import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from components.configuration.usage import UsageError
from components.evaluation.likelihood_study import bound_jobs, lossless_bits, measure_bound
from components.models.bundle import ModelBundle, save_bundle
from components.models.diffusion.discrete import KEPT, draw_timesteps, empty_history
from components.models.losses.reconstruction import reconstruction_loss
from components.sampling.cascade import Cascade
from components.sampling.images import ColorError, from_uint8, one_channel, to_uint8
from components.sampling.model import SamplingModel, load_model
from components.sampling.requests import Request
from components.training.batches import to_batch
from components.training.frozen import encoded, gray_images
from components.training.loop import Arrays
from components.training.randomness import Draws
from components.training.tasks.autoencoder import AutoencoderTask
from components.training.tasks.diffusion import DiffusionTask
from components.training.tasks.prior import PixelTask
from pipelines.recipes.catalog import load_recipe
from tests.tiny_autoencoders import config_of
from tests.tiny_training import DATASET_INFO, diffusion_config, pixel_config, rows_at

PROCESSES: dict[str, dict[str, Any]] = {
    "simple": {},
    "vlb": {"loss": "vlb", "min_snr_gamma": None},
    "learned": {"variance": "learned_range", "loss": "hybrid", "min_snr_gamma": None},
}
COLOR = r"image 1 .* the color \(200, 201, 200\) in row 2, column 3, .* learns gray images alone: set in_channels=3"


def gray_rows(count: int = 8, side: int = 8) -> Arrays:
    """Rows of the stream whose images are gray."""
    rows = rows_at(diffusion_config(resolution=side), range(count))
    return rows | {"image": np.repeat(rows["image"][..., :1], 3, axis=3)}


def colored(rows: Arrays) -> Arrays:
    """The same, but for a single level of a single value."""
    image = rows["image"].copy()
    image[1, 2, 3] = (200, 201, 200)
    return rows | {"image": image}


def diffusion_task(**changes: Any) -> DiffusionTask:
    config = diffusion_config(in_channels=1, conditions=("label",), **changes)
    return DiffusionTask(config, dataset_info=DATASET_INFO, load_encoders=(gray_images,))


def sampling_model(task: DiffusionTask | PixelTask, folder: Path, settings: dict[str, Any]) -> SamplingModel:
    """The task's model from disk, with weights that make something."""
    network, config = task.learner.network, task.config
    if isinstance(task, DiffusionTask):
        torch.nn.init.normal_(network.conv_out.weight, std=0.3)
    arguments = config.network_arguments(DATASET_INFO)
    save_bundle(folder, ModelBundle(config.network.kind, arguments, settings, network))
    return load_model("base" if isinstance(task, DiffusionTask) else "model", folder)


def test_gray_is_one_channel_that_comes_back_as_three_and_a_single_value_off_gray_is_refused() -> None:
    image = gray_rows()["image"]
    channel = one_channel(from_uint8(image))
    assert channel.shape == (8, 1, 8, 8)
    np.testing.assert_array_equal(to_uint8(channel), image)
    with pytest.raises(ColorError, match=COLOR) as caught:
        one_channel(from_uint8(colored(gray_rows())["image"]))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("process", PROCESSES)
def test_a_diffusion_model_of_one_channel_trains_samples_and_shows(process: str, tmp_path: Path) -> None:
    task, rows = diffusion_task(**PROCESSES[process]), gray_rows()
    assert task.learner.network.conv_in.in_channels == 1
    losses = [float(task.train_step(to_batch(rows), step)["loss"]) for step in range(1, 4)]
    assert all(np.isfinite(losses))
    assert Image.open(io.BytesIO(task.preview(rows, 3)["samples"])).mode == "RGB"
    model = sampling_model(task, tmp_path, task.config.settings(("a", "b", "c")))
    made = Cascade(base=model).sample([Request(label=seed, seed=seed, steps=3, sampler="ddpm") for seed in range(2)])
    assert made[0].shape == (8, 8, 3)
    assert all((image == image[..., :1]).all() for image in made)
    assert (made[0] != made[1]).any()


def test_the_loss_is_of_one_channel() -> None:
    """A network that predicts nothing at first: its loss is the mean square of the one channel's noise."""
    task, batch = diffusion_task(prediction_type="epsilon", min_snr_gamma=None), to_batch(gray_rows())
    part = encoded(batch, task.encoders)
    assert torch.equal(part["image"], batch["image"][:, :1])
    losses = task.losses(task.learner.network, part, {"label": batch["label"]}, torch.full((8,), 7))
    noise = task.draw.normal(batch["position"], "noise", (1, 8, 8))
    torch.testing.assert_close(losses, noise.square().mean(dim=(1, 2, 3)))


@pytest.mark.parametrize("name", ["vae", "vq_vae", "vae_gan"])
def test_an_autoencoder_of_one_channel_learns_and_counts_that_channel_alone(name: str) -> None:
    """With a discriminator and a perceptual network too, which see the gray as colors."""
    config = config_of(name, image_channels=1, member="depth", total_steps=30)
    task, batch = AutoencoderTask(config), to_batch(gray_rows())
    losses = [task.train_step(batch, step)["reconstruction_loss"] for step in range(1, 31)]
    assert sum(losses[-5:]) < sum(losses[:5]) - 0.05 * abs(sum(losses[:5]))
    network = task.generator.snapshot()
    assert (network.encoder.conv_in.in_channels, network.reconstruct(batch["image"]).shape[1]) == (1, 1)
    found = task.losses(batch, network, task.draws(batch, step=None))
    output, image = found.output, batch["image"][:, :1]
    own = reconstruction_loss(output, image=image, kind=config.network.reconstruction)
    torch.testing.assert_close(found.terms["reconstruction_loss"], own)
    assert found.image.shape[1] == task.decoded(output).shape[1] == 3
    assert all(each.shape[1:] == (3, 8, 8) for rows in task.shown(iter([batch])) for each in rows)
    assert task.bits_per_dim({"reconstruction_loss": 0.0, "kl_loss": 64.0}) * math.log(2) == pytest.approx(
        1.0 if name != "vq_vae" else math.prod(network.grid) * math.log(network.codebook_size) / 64
    )


@pytest.mark.parametrize("kind", ["pixelcnn", "row_lstm"])
def test_a_model_of_pixels_counts_one_channel(kind: str, tmp_path: Path) -> None:
    """What knows nothing needs 8 bits of each gray pixel, not 24, and draws gray images."""
    config = pixel_config(network=kind, in_channels=1, resolution=8)
    task, rows = PixelTask(config, dataset_info=DATASET_INFO), gray_rows()
    assert torch.equal(task.values(to_batch(rows))[:, 0], torch.from_numpy(rows["image"][..., 0]).long())
    assert np.isfinite(float(task.train_step(to_batch(rows), 1)["loss"]))
    model = sampling_model(task, tmp_path, {"resolution": 8, "classes": ["a", "b", "c"]})
    cascade = Cascade(model=model)
    (image,) = cascade.sample([Request(seed=1, label=1)] if model.classes else [Request(seed=1)])
    assert image.shape == (8, 8, 3)
    assert (image == image[..., :1]).all()
    assert Image.open(io.BytesIO(task.preview(rows, 1)["samples"])).mode == "RGB"
    for parameter in task.learner.snapshot().head.out.parameters():
        parameter.data.zero_()
    assert task.evaluate(rows) == {"held_out_bits_per_dim": pytest.approx(8.0, rel=1e-6)}


def test_trainings_and_measures_of_one_channel_refuse_color(tmp_path: Path) -> None:
    rows, diffusion = colored(gray_rows()), diffusion_task(**PROCESSES["learned"])
    pixels = PixelTask(pixel_config(in_channels=1, resolution=8), dataset_info=DATASET_INFO)
    model = sampling_model(diffusion, tmp_path, diffusion.config.settings(("a", "b", "c")))
    jobs = bound_jobs(rows["image"], rows["label"], [""] * 8)
    for refuses in (
        lambda: diffusion.train_step(to_batch(rows), 1),
        lambda: pixels.train_step(to_batch(rows), 1),
        lambda: lossless_bits(model, rows["image"]),
        lambda: measure_bound(model, jobs[0], timesteps_per_image=2, seed=0),
    ):
        with pytest.raises(ColorError, match=COLOR):
            refuses()


def test_images_without_a_model_are_measured_in_bits_of_the_channels_that_the_model_knows(tmp_path: Path) -> None:
    """Noise can't be compressed: 8 bits of each value, be it one channel or three; equal images cost one."""
    image = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    gray = np.repeat(image[..., :1], 3, axis=3)
    color_task = DiffusionTask(diffusion_config(conditions=("label",)), dataset_info=DATASET_INFO)
    color = sampling_model(color_task, tmp_path / "c", color_task.config.settings(("a", "b", "c")))
    one = sampling_model(diffusion_task(), tmp_path / "g", diffusion_task().config.settings(("a", "b", "c")))
    for model, images in ((color, image), (one, gray)):
        each, *whole, single = lossless_bits(model, images).values()
        assert each.shape == (5,)
        assert ((each > 8) & (each < 8.4)).all()
        assert all(bits.shape == (1,) and 8 < bits[0] < 8.4 for bits in whole)
        assert 7.9 < single[0] < 8
    repeated = lossless_bits(one, np.repeat(gray[:1], 16, axis=0))
    each, _, webp, single = repeated.values()
    assert webp[0] < each[0] / 8
    binary = np.repeat((gray[..., :1] > 127).astype(np.uint8), 3, axis=3)
    assert lossless_bits(one, binary)["entropy of single values"][0] == pytest.approx(1, abs=0.01)
    assert (lossless_bits(one, np.full((1, 32, 32, 3), 7, np.uint8))["entropy of single values"] == 0).all()


def test_loss_aware_timesteps_begin_before_half_of_the_training() -> None:
    """By the recipe's own draws: after the step at which each timestep has its losses."""
    base = load_recipe("fashion_likelihood_loss_aware", []).base
    numbers, total = base.optimization, base.process.num_train_timesteps
    positions = torch.arange(numbers.total_steps // 2 * numbers.global_batch_size)
    uniform = Draws(numbers.seed).uniform(positions, "timestep")
    timesteps, _ = draw_timesteps(empty_history(total), uniform)
    drawn = torch.nn.functional.one_hot(timesteps, total).reshape(-1, numbers.global_batch_size, total).sum(dim=1)
    (complete,) = (drawn.cumsum(dim=0).amin(dim=1) >= KEPT).nonzero(as_tuple=True)
    assert complete[0] + 1 == 490  # as its docstring says


@pytest.mark.parametrize(
    ("recipe", "assignments", "words"),
    [
        ("fashion_pixelcnn", "model.in_channels=2", "model.data.in_channels"),
        ("fashion_steps", "base.in_channels=2", r"base\.data\.in_channels must be 3, or 1 for gray images, not 2"),
        ("openmoji", "base.in_channels=1", r"base\.data\.in_channels must be 3: upsamplers"),
        ("openmoji", "upsamplers.0.in_channels=1", "in_channels must be 3 for a model that enlarges"),
        ("palette", "model.in_channels=1", "in_channels must be 3 for a model that enlarges or restores"),
        ("fashion_guidance", "base.in_channels=1", r"weaker\.in_channels must be base\.in_channels 1"),
        ("fashion_guidance", "base.in_channels=1 weaker.in_channels=1", r"classifier\.data\.in_channels must be"),
        ("fashion_guidance", "judge.in_channels=4", "in_channels must be 3, or those of the latents .* noisy=true"),
    ],
)
def test_channels_that_no_image_has_are_refused(recipe: str, assignments: str, words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        load_recipe(recipe, assignments.split())
    assert "\n" not in str(caught.value)
