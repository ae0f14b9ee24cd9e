"""Laws of held-out bits/dim: exact models reach the entropy, and neither jobs nor strata move the bound."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from components.configuration.sampling import DiffusionSampling
from components.evaluation.likelihood_study import (
    BoundJob,
    BoundTerms,
    bits_table,
    bound_jobs,
    check_likelihood,
    draw_terms,
    image_terms,
    joined_terms,
    measure_bound,
    standard_error,
    strata,
    summarize,
)
from components.models.diffusion.schedule import make_schedule
from components.sampling.model import SamplingModel
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
    return joined_terms([measure_bound(exact_model(channels), job, **how) for job in jobs])


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


def test_neither_the_cut_into_jobs_nor_the_company_moves_a_image() -> None:
    image, labels = normal_images(11), np.zeros(11, np.int64)
    whole = measured(image)
    job = BoundJob("alone", 9, image[9:10], labels[9:10], ("",))
    alone = measure_bound(exact_model(), job, timesteps_per_image=None, seed=0)
    np.testing.assert_array_equal(whole.terms[9], alone.terms[0])
    np.testing.assert_array_equal(whole.prior[9], alone.prior[0])
    assert [job.name for job in bound_jobs(image, labels, [""] * 11)] == ["bound-000", "bound-001"]


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


PNG = np.array([5.0, 6.0])  # of the images of `found`


def found(*, weights: tuple[int, ...]) -> BoundTerms:
    terms = np.array([[2.0, 0.5, 0.25], [4.0, 0.5, 0.75]])
    times = np.array([[0, 1, 2], [0, 1, 2]])
    return BoundTerms(np.array([0.1, 0.1]), terms, times, np.array(weights))


def test_an_estimate_is_never_called_the_bound() -> None:
    bounds = [found(weights=weights) for weights in ((1, 1, 1), (1, 2, 4))]
    exact, estimate = (summarize(bound.parts(), png=PNG, exact=bound.is_exact) for bound in bounds)
    assert exact["held_out_bits_per_dim"] == pytest.approx(0.1 + 3 + 1)
    assert exact["held_out_bits_per_dim_reconstruction"] == 3
    assert exact["held_out_bits_per_dim_denoising"] == 1
    assert exact["held_out_bits_per_dim_standard_error"] == pytest.approx(2.5 / 2)
    assert estimate["estimated_held_out_bits_per_dim"] == pytest.approx(0.1 + 3 + 1 + 2)
    assert exact.keys() & estimate.keys() == {"png_bits_per_dim"}
    assert exact["png_bits_per_dim"] == 5.5


def test_the_table_and_the_plot_tell_the_parts() -> None:
    one = measured(normal_images(3))
    table = bits_table({name or "bound": part for name, part in one.parts().items()}, png=PNG, sum_over="all t")
    rows = {row[0]: row[1] for row in table["rows"]}
    assert rows["as PNG"] == 5.5
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
