"""Laws of the study of noising: the forward process on real images, and what a model sees in it."""

import io
import re
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

from components.data.held_out import SplitArrays, read_split
from components.data.shards import ShardIndex, View
from components.evaluation.noising_study import (
    ERRORS,
    FORWARD,
    PREDICTED,
    SCHEDULES,
    VALUES,
    NoisingStudy,
    NoisingStudyConfig,
    discrete_objective,
    draw_reverse_step,
    draw_schedules,
    draw_values,
    predicted_x_0,
    values_table,
    with_noise,
)
from components.evaluation.study import Findings, StudyPlan
from components.models.diffusion.reverse_step import TWO_PEAKS, Mixture, mean_distance
from components.models.diffusion.schedule import make_schedule
from components.runtime.storage.artifact import Artifact
from components.runtime.storage.store import Store
from components.sampling.model import load_model
from tests import image_sets
from tests.image_sets import write_set
from tests.tiny_cascade import DIFFUSION, UNET, commit_model, write_model, write_models
from tests.unit.test_evaluation_report import Page
from tests.unit.test_likelihood_study import exact_model, normal_images

LINEAR, COSINE = (make_schedule(name, num_train_timesteps=1000) for name in ("linear", "cosine"))
PHOTOS = np.repeat(np.random.default_rng(0).choice([0, 40, 255], (32, 16, 16, 1)), 3, axis=-1).astype(np.uint8)
CONFIG = NoisingStudyConfig(samples=6, shown=2, frames=3)


@pytest.mark.parametrize("schedule", [LINEAR, COSINE], ids=["linear", "cosine"])
def test_the_variance_of_x_t_is_alpha_bar_times_that_of_x_0_and_the_rest(schedule) -> None:
    rows = values_table(schedule, with_noise(PHOTOS, seed=0))["rows"]
    x_0 = PHOTOS / 127.5 - 1
    for steps, left, mean, variance, said in rows:
        assert left == pytest.approx(float(schedule.alphas_cumprod[int(steps) - 1]))
        assert said == pytest.approx(left * x_0.var() + 1 - left, rel=1e-3)
        assert variance == pytest.approx(said, rel=0.02)
        assert mean == pytest.approx(np.sqrt(left) * x_0.mean(), abs=0.03)
    assert [rows[0][0], rows[-1][0]] == ["1", "1000"]


def test_at_the_end_every_pixel_is_standard_normal() -> None:
    last = with_noise(PHOTOS, seed=0).at(LINEAR, 999).flatten().double()
    assert len(last) > 20_000
    below = torch.tensor([(last < edge).double().mean() for edge in (-2.0, -1.0, 0.0, 1.0, 2.0)])
    torch.testing.assert_close(below, torch.special.ndtr(torch.tensor([-2.0, -1, 0, 1, 2])).double(), atol=0.02, rtol=0)


def test_an_image_has_one_noise_at_all_times_and_in_all_company() -> None:
    alone, among = with_noise(PHOTOS[3:4], seed=3), with_noise(PHOTOS, seed=0)
    torch.testing.assert_close(alone.noise[0], among.noise[3], rtol=0, atol=0)
    left = LINEAR.alphas_cumprod.float()
    for time in (0, 500, 999):
        expected = left[time].sqrt() * among.x_0 + (1 - left[time]).sqrt() * among.noise
        torch.testing.assert_close(among.at(LINEAR, time), expected)


def test_an_exact_model_predicts_x_0_as_well_as_can_be() -> None:
    """Of normal pixels: the squared error of the mean of x_0 given x_t."""
    model = exact_model()
    objective, images = discrete_objective(model), normal_images(64)
    noised, variance = with_noise(images, seed=0), (images / 127.5 - 1).var()
    words, empty = ("",) * 64, np.zeros(64, np.int64)
    none = SplitArrays(images, empty, np.zeros((64, 0), np.int64), words, words)
    for time in (0, 10, 39):
        left = float(objective.schedule.alphas_cumprod[time])
        least = variance * (1 - left) / (left * variance + 1 - left)
        error = float((predicted_x_0(model, objective, none, noised, time) - noised.x_0).square().mean())
        assert error == pytest.approx(least, rel=0.1)


def test_the_plots_show_both_schedules_and_the_normal_density() -> None:
    page = Page(draw_schedules(LINEAR, salt="a"))
    assert {"linear", "cosine"} <= set(page.text.split())
    assert "the model's" not in page.text
    zero = make_schedule("cosine", num_train_timesteps=1000, zero_terminal_snr=True)
    assert "the model's" in Page(draw_schedules(zero, salt="b")).text
    values = Page(draw_values(LINEAR, with_noise(PHOTOS, seed=0), salt="c")).text
    assert all(words in values for words in ("1 step", "1000 steps", "N(0, 1)"))


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    return write_set(Store(str(tmp_path_factory.mktemp("images"))), sizes=(40, 40), resolution=16)


def findings_of(config: NoisingStudyConfig, index: ShardIndex, model: Artifact) -> Findings:
    return NoisingStudy(config, index, {"model": model}, Store("memory://noising"), "study").findings(StudyPlan({}), {})


@pytest.fixture(scope="module")
def found(index: ShardIndex, tmp_path_factory: pytest.TempPathFactory) -> Findings:
    root = tmp_path_factory.mktemp("noising")
    model = commit_model(root, "base", "k", write_models(root / "models")["base"])
    return findings_of(CONFIG.replace(resolution=16), index, model)


def test_the_study_of_a_trained_model_leaves_images_plots_and_figures(found: Findings) -> None:
    assert set(found.images) == {FORWARD, PREDICTED}
    assert set(found.plots) == {VALUES, SCHEDULES, ERRORS}
    assert found.summary["predicted_x_0_error"] > 0
    assert 0 < found.summary["last_alpha_bar"] < 0.01
    ids = re.findall(r'\bid="([^"]+)"', "".join(found.plots.values()))
    assert len(ids) == len(set(ids))


def test_a_base_of_one_channel_is_studied_on_the_channel_of_gray_images(tmp_path: Path) -> None:
    gray = lambda number, resolution: np.full((resolution, resolution, 3), number, np.uint8)  # noqa: E731
    with mock.patch.object(image_sets, "image", gray):
        index = image_sets.write_set(Store(str(tmp_path / "images")), sizes=(40, 40), resolution=16)
    network = UNET | {"resolution": 8, "in_channels": 1}
    folder = write_model(tmp_path / "base", "unet", network, DIFFUSION | {"role": "base", "resolution": 8})
    found = findings_of(CONFIG, index, commit_model(tmp_path, "base", "k", folder))
    assert set(found.images) == {FORWARD, PREDICTED}
    assert found.summary["predicted_x_0_error"] > 0


def test_a_held_out_image_is_shown_clean_first_and_then_with_more_and_more_noise(found: Findings, index: ShardIndex):
    strip = np.asarray(Image.open(io.BytesIO(found.images[FORWARD])).convert("RGB"), dtype=np.float64)
    first = strip[8:136]  # the row of the first image: x_0 and three times
    cells = [first[:, 8 + 136 * number : 136 + 136 * number] for number in range(4)]
    shown = cells[0][::8, ::8]
    np.testing.assert_array_equal(shown, read_split(index, "holdout", View(16), limit=1).image[0])
    away = [np.abs(cell - cells[0]).mean() for cell in cells]
    assert away[0] == 0 < away[1] < away[2] < away[3]


def test_what_has_no_such_times_is_refused(tmp_path: Path) -> None:
    folder = write_models(tmp_path)["upsampler_16"]
    with pytest.raises(ValueError, match="upsampler_16 makes no image of noise alone"):
        discrete_objective(load_model("upsampler_16", folder))
    flow = exact_model()._replace(settings={"objective": {"kind": "flow"}, "resolution": 4})
    with pytest.raises(ValueError, match="discrete steps"):
        discrete_objective(flow)
    index = write_set(Store(str(tmp_path / "images")), sizes=(8,), holdout_fraction=0.0)
    model = commit_model(tmp_path, "base", "k", write_models(tmp_path / "models")["base"])
    with pytest.raises(ValueError, match="holds no image out"):
        findings_of(CONFIG, index, model)


@pytest.mark.parametrize("beta", [0.02, 0.3, 0.95])
def test_the_reverse_step_of_a_mixture_is_that_of_bayes_rule_on_a_grid(beta: float) -> None:
    before, x_t = Mixture(*torch.tensor([[0.3, 0.7], [-1.0, 0.5]], dtype=torch.float64), 0.04), 0.2
    values = torch.linspace(-4, 4, 8001, dtype=torch.float64)
    forward = (-((x_t - (1 - beta) ** 0.5 * values) ** 2) / (2 * beta)).exp()  # q(x_t | x_{t-1}) but for a factor
    joint = before.density(values) * forward
    np.testing.assert_allclose(before.reversed(x_t, beta).density(values), joint / (joint.sum() * 1e-3), atol=1e-6)


def test_the_reverse_step_is_gaussian_where_beta_is_small_and_the_data_s_own_where_it_is_one() -> None:
    steps = {beta: TWO_PEAKS.reversed(0.0, beta).distance_from_gaussian() for beta in (1e-5, 1e-4, 1e-3)}
    assert steps[1e-4] < 1e-4 < steps[1e-3] < 1e-2
    assert steps[1e-5] / steps[1e-4] == pytest.approx(0.01, rel=0.1)  # of second order in beta
    itself = TWO_PEAKS.distance_from_gaussian()
    assert TWO_PEAKS.reversed(0.0, 1 - 1e-9).distance_from_gaussian() == pytest.approx(itself, rel=1e-3)
    assert mean_distance(TWO_PEAKS, 1e-3) < 1e-4 < mean_distance(TWO_PEAKS, 0.5) < itself
    one = TWO_PEAKS.gaussian()
    assert one.reversed(1.0, 0.5).distance_from_gaussian() == pytest.approx(0, abs=1e-12)
    assert all("Gaussian" in Page(svg).text for svg in draw_reverse_step().values())
