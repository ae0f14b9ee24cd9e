"""Laws of the figures of a set: Fréchet distance and its error, precision and recall, and the table that lists them."""

import numpy as np
import pytest

from components.evaluation import metrics
from components.evaluation.image_sets import REFERENCE
from components.evaluation.metrics import (
    USUAL,
    Compared,
    DistanceRow,
    Gaussian,
    distance_error,
    distance_of_halves,
    frechet_distance,
    gaussian_of,
    measured_row,
    precision_recall,
)


def features(count: int, *, dims: int = 6, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return (generator.standard_normal((count, dims)) @ generator.standard_normal((dims, dims))).astype(np.float32)


def test_the_distance_of_gaussians_that_share_axes_is_the_closed_form() -> None:
    means, spreads = np.array([[0.0, 1.0, 2.0], [3.0, 1.0, -1.0]]), np.array([[1.0, 2.0, 3.0], [2.0, 2.0, 0.5]])
    rotation = np.linalg.qr(np.random.default_rng(1).standard_normal((3, 3)))[0]
    one, other = (Gaussian(rotation @ m, rotation @ np.diag(s)) for m, s in zip(means, spreads, strict=True))
    expected = ((means[0] - means[1]) ** 2).sum() + ((spreads[0] - spreads[1]) ** 2).sum()
    assert frechet_distance(one, other) == pytest.approx(expected, rel=1e-12)


def test_the_distance_equals_the_one_by_a_general_matrix_root_either_way_and_is_zero_from_itself() -> None:
    """guided-diffusion #77: users measured 132 between a reference and itself, and nothing failed."""
    from scipy.linalg import sqrtm

    one, other = gaussian_of(features(200, seed=1)), gaussian_of(features(300, seed=2))
    first, second = (each.root @ each.root.T for each in (one, other))
    expected = ((one.mean - other.mean) ** 2).sum() + np.trace(first + second - 2 * sqrtm(first @ second).real)
    assert frechet_distance(one, other) == pytest.approx(expected, rel=1e-8)
    assert frechet_distance(other, one) == pytest.approx(frechet_distance(one, other), rel=1e-9)
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("count", [5, 80])
def test_fewer_images_than_features_have_the_distance_of_their_covariances(count: int) -> None:
    few, other = gaussian_of(features(5, dims=40)), gaussian_of(features(count, dims=40, seed=3))
    assert few.root.shape == (40, 5)
    values, vectors = np.linalg.eigh(np.cov(features(5, dims=40).astype(float), rowvar=False))
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    covariance = np.cov(features(count, dims=40, seed=3).astype(float), rowvar=False)
    trace = np.sqrt(np.linalg.eigvalsh(root @ covariance @ root).clip(min=0)).sum()
    means = ((few.mean - other.mean) ** 2).sum()
    expected = means + values.sum() + np.trace(covariance) - 2 * trace
    assert frechet_distance(few, other) == pytest.approx(expected, rel=1e-7)


def test_two_halves_of_a_set_come_closer_the_larger_it_is() -> None:
    small, large = (distance_of_halves(features(count), seed=0) for count in (100, 10_000))
    assert 0 < large < small / 20


def test_one_image_damaged_features_and_too_few_images_are_refused() -> None:
    with pytest.raises(ValueError, match="at least two"):
        gaussian_of(features(1))
    with pytest.raises(ValueError, match="not finite"):
        gaussian_of(np.full((3, 2), np.nan))
    with pytest.raises(ValueError, match="more than 3 images"):
        precision_recall(normal(3), normal(9))


def normal(count: int, *, dims: int = 5, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, dims)).astype(np.float32)


def naive(points: np.ndarray, centers: np.ndarray, neighbors: int) -> float:
    """Equations 1 and 2 of the paper, feature by feature."""
    points, centers = points.astype(np.float64), centers.astype(np.float64)
    reaches = [sorted(np.linalg.norm(center - other) for other in centers)[neighbors] for center in centers]
    near = [[np.linalg.norm(p - c) <= reach for c, reach in zip(centers, reaches, strict=True)] for p in points]
    return float(np.mean([any(row) for row in near]))


@pytest.mark.parametrize("neighbors", [1, 3])
def test_both_are_the_equations_of_the_paper_whatever_the_block(neighbors: int, monkeypatch: pytest.MonkeyPatch):
    real, generated = normal(23), 0.7 * normal(17, seed=1) + 0.5
    expected = naive(generated, real, neighbors), naive(real, generated, neighbors)
    assert 0 < min(expected) < max(expected) < 1
    for block in (256, 4):
        monkeypatch.setattr(metrics, "BLOCK", block)
        assert precision_recall(real, generated, neighbors=neighbors) == pytest.approx(expected)


def test_a_set_has_all_of_itself_nothing_of_what_is_far_away_and_a_part_of_a_wider_one() -> None:
    features = normal(60, dims=40)
    twice = np.concatenate([features] * 5)  # radii of zero
    assert precision_recall(features, features) == precision_recall(twice, twice) == (1, 1)
    assert precision_recall(features, features[::-1] + 100) == (0, 0)
    clusters = np.concatenate([normal(50), normal(50, seed=1) + 50])
    one = normal(100, seed=2)
    assert precision_recall(clusters, one).precision > 0.8
    assert precision_recall(clusters, one).recall == pytest.approx(0.5, abs=0.1)
    swapped = precision_recall(one, clusters)
    assert swapped == precision_recall(clusters, one)[::-1]


@pytest.mark.parametrize(("count", "dims"), [(160, 4), (160, 200)])
def test_the_error_is_the_deviation_of_the_distance_of_other_samples(count: int, dims: int) -> None:
    """Both where images and where dimensions are fewer."""
    reference = gaussian_of(normal(2000, dims=dims, seed=9))
    sets = [1.5 * normal(count, dims=dims, seed=seed) + 0.5 for seed in range(100, 140)]
    true = np.std([frechet_distance(gaussian_of(each), reference) for each in sets], ddof=1)
    errors = [distance_error(each, reference, seed=0) for each in sets]
    assert None not in errors
    assert np.mean([error or 0.0 for error in errors]) == pytest.approx(true, rel=0.3)


def row_of(name: str, features: np.ndarray, references: np.ndarray) -> DistanceRow:
    return measured_row(name, "model", Compared(features, references, gaussian_of(references), seed=0), USUAL)


def test_a_row_compares_as_many_training_images_as_there_are_samples() -> None:
    features = {REFERENCE: normal(400), "made": 2 * normal(100, seed=1), "two": normal(2, seed=2)}
    made, two = (row_of(name, features[name], features[REFERENCE]) for name in ("made", "two"))
    drawn = np.random.default_rng(0).permutation(400)[:100]
    shares = precision_recall(features[REFERENCE][drawn], features["made"])
    assert (made.figure("precision"), made.figure("recall")) == shares
    assert made.error("precision") == pytest.approx((shares.precision * (1 - shares.precision) / 100) ** 0.5)
    assert made.error("distance") == made.standard_error is not None
    assert set(made.metrics("net")) == {"fd_net_made", "precision_net_made", "recall_net_made"}
    assert (two.standard_error, two.figure("precision"), two.figure("recall")) == (None, None, None)
    assert set(two.metrics("net")) == {"fd_net_two"}
    errors = [distance_error(normal(count), gaussian_of(normal(100, seed=1)), seed=0) for count in (31, 32)]
    assert errors[0] is None is not errors[1]
