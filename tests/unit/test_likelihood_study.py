"""Laws of held-out bits/dim: exact models reach the entropy, and neither jobs nor strata move a figure."""

import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from components.configuration.conditions import DatasetInfo
from components.configuration.sampling import DiffusionSampling
from components.configuration.trainings import PixelTraining
from components.evaluation.features import joined
from components.evaluation.likelihood_study import (
    STREAM,
    BoundJob,
    BoundTerms,
    bound_figures,
    bound_jobs,
    check_likelihood,
    draw_terms,
    image_terms,
    measure_bits,
    measure_bound,
    standard_error,
    strata,
)
from components.models.diffusion.schedule import make_schedule
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
from tests.unit.test_evaluation_report import Page

T, DEVIATION, SIDE = 40, 0.15, 4
OBJECTIVE = {
    "kind": "discrete",
    "schedule": "linear",
    "num_train_timesteps": T,
    "prediction_type": "epsilon",
    "variance": "learned_range",
    "loss": "hybrid",
}


class ExactNetwork(nn.Module):
    """Noise and variance of the true reverse process of independent normal pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))
        self.schedule = make_schedule("linear", num_train_timesteps=T)

    def forward(self, x_t: Tensor, timesteps: Tensor) -> Tensor:
        schedule, x_t = self.schedule, x_t.double()
        cumulated, previous, betas = schedule.alphas_cumprod, schedule.tables["alphas_cumprod_prev"], schedule.betas
        spread = cumulated * DEVIATION**2 + 1 - cumulated  # variance of x_t
        rest = DEVIATION**2 * (1 - cumulated) / spread  # variance of x_0, x_t given
        variance = schedule.tables["posterior_variance"] + (betas * previous.sqrt() / (1 - cumulated)) ** 2 * rest
        small, large = schedule.tables["posterior_log_variance_clipped"], betas.log()
        values = 2 * (variance.log() - small) / (large - small) - 1
        epsilon = x_t * ((1 - cumulated).sqrt() / spread)[timesteps].reshape(-1, 1, 1, 1)
        return torch.cat([epsilon, values[timesteps].reshape(-1, 1, 1, 1).expand_as(x_t)], dim=1)


def exact_model(channels: int = 3) -> SamplingModel:
    settings, network = {"objective": OBJECTIVE, "resolution": SIDE}, {"in_channels": channels}
    return SamplingModel("base", "unet", network, settings, ExactNetwork(), None, DiffusionSampling())


def normal_images(count: int, channels: int = 3) -> np.ndarray:
    """Of independent values; gray ones have three equal channels."""
    values = np.random.default_rng(0).normal(0, DEVIATION, (count, SIDE, SIDE, channels))
    return np.rint((values + 1) * 127.5).clip(0, 255).astype(np.uint8).repeat(3 // channels, axis=3)


def measured(image: np.ndarray, channels: int = 3, *, timesteps_per_image: int | None = None) -> BoundTerms:
    jobs = bound_jobs(image, np.zeros(len(image), np.int64), [""] * len(image))
    how = {"timesteps_per_image": timesteps_per_image, "seed": 0}
    parts = [measure_bound(exact_model(channels), job, **how) for job in jobs]
    return BoundTerms(**joined([part._asdict() for part in parts]))._replace(weights=parts[0].weights)


def true_bits(image: np.ndarray) -> np.ndarray:
    """-log2 of the normal density times the width of a level, a dimension, (N,)."""
    x_0 = image.astype(np.float64) / 127.5 - 1
    nats = 0.5 * math.log(2 * math.pi * DEVIATION**2) + x_0**2 / (2 * DEVIATION**2) - math.log(2 / 255)
    return nats.mean(axis=(1, 2, 3)) / math.log(2)


@pytest.mark.parametrize(("count", "channels"), [(None, 3), (12, 3), (None, 1), (12, 1)])
def test_the_bound_of_the_exact_model_is_what_its_images_cost(count: int | None, channels: int) -> None:
    image = normal_images(48 if channels == 3 else 144, channels)
    difference = measured(image, channels, timesteps_per_image=count).parts()[""] - true_bits(image)
    error = standard_error(difference)
    assert abs(difference.mean()) < 4 * error < 0.15
    entropy = (0.5 * math.log(2 * math.pi * math.e * DEVIATION**2) - math.log(2 / 255)) / math.log(2)
    assert true_bits(image).mean() == pytest.approx(entropy, abs=0.1)


def test_batches_of_times_do_not_move_the_noise() -> None:
    x_0, edges = torch.zeros(3, 5, 5), strata(150, 150)

    def first(x_0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        assert len(x_0) == len(noise) == len(timesteps) <= 64
        return noise[:, 0, 0, 0]

    _, found = image_terms(first, x_0, edges=edges, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(1)
    torch.rand(150, generator=generator, dtype=torch.float64)
    np.testing.assert_array_equal(found, [torch.randn(3, 5, 5, generator=generator)[0, 0, 0] for _ in range(150)])


@pytest.mark.parametrize(("total", "count"), [(1000, 100), (1000, 1000), (1000, 2), (4000, 37), (7, 5), (1, 1)])
def test_strata_cover_every_timestep_once_and_keep_the_first_alone(total: int, count: int) -> None:
    edges = strata(total, count)
    assert (edges[0], edges[1], edges[-1], len(edges)) == (0, 1, total, count + 1)
    assert (np.diff(edges) >= 1).all()


@pytest.mark.parametrize("count", [0, 1, 1001])
def test_an_impossible_number_of_strata_is_refused(count: int) -> None:
    with pytest.raises(ValueError, match=r"timesteps_per_image must be in \[2, 1000\]"):
        strata(1000, count)


def test_the_stratified_sum_is_unbiased_with_the_deviation_over_the_root_of_the_number_as_its_error() -> None:
    edges, value = strata(200, 15), 1 / (1 + torch.arange(200, dtype=torch.float64))

    def term(x_0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return value[timesteps]

    draw = partial(image_terms, term, torch.zeros(1, 1, 1), edges=edges)
    sums = [(draw(generator=torch.Generator().manual_seed(n))[1] * np.diff(edges)).sum() for n in range(400)]
    assert abs(np.mean(sums) - float(value.sum())) < 4 * standard_error(np.array(sums)) < 0.1
    assert standard_error(np.array([1.0, 2.0, 3.0, 4.0])) == pytest.approx(math.sqrt(5 / 3) / 2)
    assert math.isnan(standard_error(np.array([1.0])))


LOSSLESS = {"each as a PNG, its data alone": np.array([5.0, 6.0])}  # of the images of `found`


def found(*, weights: tuple[int, ...]) -> BoundTerms:
    terms = np.array([[2.0, 0.5, 0.25], [4.0, 0.5, 0.75]])
    times = np.array([[0, 1, 2], [0, 1, 2]])
    return BoundTerms(np.array([0.1, 0.1]), terms, times, np.array(weights))


def test_an_estimate_is_never_called_the_bound() -> None:
    bounds = [found(weights=weights) for weights in ((1, 1, 1), (1, 2, 4))]
    exact, estimate = (bound_figures(bound, lossless=LOSSLESS)[1] for bound in bounds)
    assert exact["held_out_bits_per_dim"] == pytest.approx(0.1 + 3 + 1)
    assert exact["held_out_bits_per_dim_reconstruction"] == 3
    assert exact["held_out_bits_per_dim_denoising"] == 1
    assert exact["held_out_bits_per_dim_standard_error"] == pytest.approx(2.5 / 2)
    assert estimate["estimated_held_out_bits_per_dim"] == pytest.approx(0.1 + 3 + 1 + 2)
    assert exact.keys() & estimate.keys() == {"png_bits_per_dim"}
    assert exact["png_bits_per_dim"] == 5.5


def test_the_table_and_the_plot_tell_the_parts() -> None:
    one = measured(normal_images(3))
    table, _ = bound_figures(one, lossless=LOSSLESS)
    rows = {row[0]: row[1] for row in table["rows"]}
    assert rows["each as a PNG, its data alone"] == 5.5
    assert rows["bound"] == pytest.approx(rows["prior"] + rows["denoising"] + rows["reconstruction"])
    page = Page(draw_terms(one, salt="likelihood"))
    assert all(words in page.text for words in ("denoising", "bound from t on", "bits/dim"))


@pytest.mark.parametrize(
    ("settings", "words"), [({"role": "upsampler"}, "upsampler"), ({"objective": {"kind": "flow"}}, "discrete")]
)
def test_a_model_without_this_bound_is_refused_in_one_line(settings: dict[str, object], words: str) -> None:
    model = exact_model()
    with pytest.raises(ValueError, match=words):
        check_likelihood(model._replace(settings=model.settings | settings))


VAE = ("autoencoder", {**TOKENIZER, "bottleneck": {"kind": "gaussian"}, "reconstruction": "discretized_logistic"})
LABELS = np.array([0, 1, 2, 1, 0, 2, 2, 1, 0, 1, 2])


def images(side: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (len(LABELS), side, side, 3), dtype=np.uint8)


def jobs_of(side: int) -> list[BoundJob]:
    return bound_jobs(images(side), LABELS, [""] * len(LABELS))


def bits_of(model: SamplingModel, side: int) -> np.ndarray:
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
    bits = bits_of(model, 4)
    assert len(bits) == len(LABELS)
    assert bits.mean() == pytest.approx(expected, rel=1e-5)


def test_a_model_that_knows_nothing_costs_eight_bits(tmp_path: Path) -> None:
    model = load_model("pixels", write(tmp_path, *LONE["pixels"]))
    for parameter in model.module.parameters():
        nn.init.zeros_(parameter)
    np.testing.assert_allclose(bits_of(model, 4), 8)


def test_the_bound_of_a_vae_is_reconstruction_and_divergence_of_its_own_draw(vae_model: SamplingModel) -> None:
    image, network = from_uint8(images(16)), vae_model.module
    shape = network.latent_shape
    assert isinstance(shape, tuple)
    noise = torch.stack([torch.randn(shape, generator=random_stream(5 + n, STREAM)) for n in range(len(image))])
    with torch.no_grad():
        output, encoded = network(image, noise=noise)
    nats = reconstruction_loss(output, image=image, kind="discretized_logistic")
    nats = nats + encoded.losses["kl_loss"] / image[0].numel()
    assert bits_of(vae_model, 16).mean() == pytest.approx(float(nats) / math.log(2), rel=1e-5)


def test_neither_the_cut_into_jobs_nor_the_company_moves_an_image(vae_model: SamplingModel) -> None:
    assert [job.name for job in jobs_of(16)] == ["bound-000", "bound-001"]
    alone = BoundJob("alone", 9, images(16)[9:10], LABELS[9:10], ("",))
    np.testing.assert_array_equal(bits_of(vae_model, 16)[9:10], measure_bits(vae_model, alone, seed=5))
    whole = measured(normal_images(11))
    alone = measure_bound(
        exact_model(), alone._replace(image=normal_images(11)[9:10]), timesteps_per_image=None, seed=0
    )
    np.testing.assert_array_equal(whole.terms[9], alone.terms[0])
    np.testing.assert_array_equal(whole.prior[9], alone.prior[0])


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
