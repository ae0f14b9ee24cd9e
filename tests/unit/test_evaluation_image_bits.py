"""Laws of bits/dim of whole images: those of training, whatever the cut into jobs, and no fewer than there are."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from components.configuration.conditions import DatasetInfo
from components.configuration.trainings import PixelTraining
from components.evaluation.likelihood_study import (
    STREAM,
    BoundJob,
    bits_table,
    bound_jobs,
    check_likelihood,
    measure_bits,
    standard_error,
    summarize,
)
from components.models.losses.reconstruction import reconstruction_loss
from components.models.pixelcnn import RowLSTM
from components.sampling.images import from_uint8
from components.sampling.model import SamplingModel, load_model
from components.sampling.plan import random_stream
from components.training.tasks.prior import PixelTask
from pipelines.recipes.catalog import RECIPES
from pipelines.recipes.systems import pixelcnn
from tests.tiny_cascade import TOKENIZER
from tests.tiny_generators import LONE, PRIORS, write

VAE = ("autoencoder", {**TOKENIZER, "bottleneck": {"kind": "gaussian"}, "reconstruction": "discretized_logistic"})
LABELS = np.array([0, 1, 2, 1, 0, 2, 2, 1, 0, 1, 2])


def images(side: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (len(LABELS), side, side, 3), dtype=np.uint8)


def jobs_of(side: int) -> list[BoundJob]:
    return bound_jobs(images(side), LABELS, [""] * len(LABELS))


def measured(model: SamplingModel, side: int) -> np.ndarray:
    return np.concatenate([measure_bits(model, job, seed=5) for job in jobs_of(side)])


@pytest.fixture
def vae_model(tmp_path: Path) -> SamplingModel:
    return load_model("vae", write(tmp_path, *VAE, {"resolution": 16}))


@pytest.mark.parametrize("kind", ["pixelcnn", "row_lstm"])
def test_exact_bits_are_those_of_training_on_the_same_images(kind: str) -> None:
    config = pixelcnn().replace(network=kind, resolution=4, channels=12, num_layers=2)
    assert isinstance(config, PixelTraining)
    task = PixelTask(config, dataset_info=DatasetInfo(num_classes=3))
    for parameter in task.learner.network.parameters():
        nn.init.normal_(parameter, std=0.2)
    task.learner.average()
    for average, own in zip(task.learner.snapshot().parameters(), task.learner.network.parameters(), strict=True):
        average.data.copy_(own)
    network, settings = config.network_arguments(DatasetInfo(num_classes=3)), {"resolution": 4}
    held_out = {"image": images(4), "label": LABELS}
    expected = task.evaluate(held_out)["held_out_bits_per_dim"]
    module = task.learner.snapshot().eval()
    model = SamplingModel("pixels", kind, network, settings, module, None, None)  # pyrefly: ignore[bad-argument-type]
    bits = measured(model, 4)
    assert len(bits) == len(LABELS)
    assert bits.mean() == pytest.approx(expected, rel=1e-5)


def test_a_model_that_knows_nothing_costs_eight_bits(tmp_path: Path) -> None:
    model = load_model("pixels", write(tmp_path, *LONE["pixels"]))
    for parameter in model.module.parameters():
        nn.init.zeros_(parameter)
    np.testing.assert_allclose(measured(model, 4), 8)


def test_the_bound_of_a_vae_is_reconstruction_and_divergence_of_its_own_draw(vae_model: SamplingModel) -> None:
    image, network = from_uint8(images(16)), vae_model.module
    shape = network.latent_shape
    assert isinstance(shape, tuple)
    noise = torch.stack([torch.randn(shape, generator=random_stream(5 + n, STREAM)) for n in range(len(image))])
    with torch.no_grad():
        output, encoded = network(image, noise=noise)
    nats = reconstruction_loss(output, image=image, kind="discretized_logistic")
    nats = nats + encoded.losses["kl_loss"] / image[0].numel()
    assert measured(vae_model, 16).mean() == pytest.approx(float(nats) / math.log(2), rel=1e-5)


def test_neither_the_cut_into_jobs_nor_the_company_moves_an_image(vae_model: SamplingModel) -> None:
    alone = BoundJob("alone", 9, images(16)[9:10], LABELS[9:10], ("",))
    np.testing.assert_array_equal(measured(vae_model, 16)[9:10], measure_bits(vae_model, alone, seed=5))


def test_models_without_a_likelihood_of_pixels_are_refused(tmp_path: Path, vae_model: SamplingModel) -> None:
    check_likelihood(vae_model)
    tokens = load_model("prior", write(tmp_path / "p", *PRIORS["row_lstm"]))
    assert isinstance(tokens.module, RowLSTM)
    with pytest.raises(ValueError, match="knows tokens"):
        check_likelihood(tokens._replace(settings={}))
    with pytest.raises(ValueError, match="bound on 8-bit values"):
        check_likelihood(load_model("vae", write(tmp_path / "v", *LONE["vae"])))


@pytest.mark.parametrize(
    ("name", "words"),
    [("gan", "a gan has none"), ("vqgan", "bottleneck gaussian"), ("vae", "only diffusion has timesteps")],
)
def test_a_recipe_asks_no_likelihood_of_a_model_that_has_none(name: str, words: str) -> None:
    recipe, steps = RECIPES[name](), {"timesteps_per_image": 5} if name == "vae" else {}
    with pytest.raises(ValueError, match=words):
        type(recipe).model_validate(recipe.model_dump() | {"likelihood": {"samples": 8, **steps}})


def test_figures_are_means_with_errors_over_images() -> None:
    bits, png = np.array([2.0, 3.0, 4.0]), np.array([5.0, 6.0, 7.0])
    found = summarize({"": bits}, png=png)
    assert found["held_out_bits_per_dim"] == 3.0
    assert found["held_out_bits_per_dim_standard_error"] == standard_error(bits)
    assert [row[1:] for row in bits_table({"exact": bits}, png=png)["rows"]] == [
        [3.0, standard_error(bits), 3],
        [6.0, standard_error(png), 3],
    ]
