"""Laws of the Fréchet distance."""

import io

import numpy as np
import pytest

from components.evaluation.distance import (
    Gaussian,
    distance_of_halves,
    frechet_distance,
    gaussian_of,
    pack_gaussian,
)


def features(count: int, *, dims: int = 6, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return (generator.standard_normal((count, dims)) @ generator.standard_normal((dims, dims))).astype(np.float32)


def test_a_set_has_no_distance_from_itself() -> None:
    """guided-diffusion #77: users measured 132 between a reference and itself, and nothing failed."""
    one = gaussian_of(features(500))
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-9)


def test_the_distance_of_gaussians_that_share_axes_is_the_closed_form() -> None:
    means, spreads = np.array([[0.0, 1.0, 2.0], [3.0, 1.0, -1.0]]), np.array([[1.0, 2.0, 3.0], [2.0, 2.0, 0.5]])
    rotation = np.linalg.qr(np.random.default_rng(1).standard_normal((3, 3)))[0]
    one, other = (
        Gaussian(rotation @ m, rotation @ np.diag(s**2) @ rotation.T, 9) for m, s in zip(means, spreads, strict=True)
    )
    expected = ((means[0] - means[1]) ** 2).sum() + ((spreads[0] - spreads[1]) ** 2).sum()
    assert frechet_distance(one, other) == pytest.approx(expected, rel=1e-12)


def test_the_distance_equals_the_one_by_a_general_matrix_root() -> None:
    from scipy.linalg import sqrtm

    one, other = gaussian_of(features(200, seed=1)), gaussian_of(features(300, seed=2))
    root = sqrtm(one.covariance @ other.covariance).real
    expected = ((one.mean - other.mean) ** 2).sum() + np.trace(one.covariance + other.covariance - 2 * root)
    assert frechet_distance(one, other) == pytest.approx(expected, rel=1e-8)


def test_the_distance_does_not_know_which_set_comes_first() -> None:
    one, other = gaussian_of(features(40, seed=1)), gaussian_of(features(90, seed=2))
    assert frechet_distance(one, other) == pytest.approx(frechet_distance(other, one), rel=1e-9)


def test_fewer_images_than_features_still_give_a_finite_distance() -> None:
    few = gaussian_of(features(5, dims=40))
    assert 0 < frechet_distance(few, gaussian_of(features(80, dims=40, seed=3))) < np.inf


def test_two_halves_of_a_set_come_closer_the_larger_it_is() -> None:
    small, large = (distance_of_halves(features(count), seed=0) for count in (100, 10_000))
    assert 0 < large < small / 20


def test_statistics_survive_storage() -> None:
    one, other = gaussian_of(features(200, seed=1)), gaussian_of(features(300, seed=2))
    with np.load(io.BytesIO(pack_gaussian(one)), allow_pickle=False) as arrays:
        stored = Gaussian(arrays["mean"].astype(float), arrays["covariance"].astype(float), int(arrays["count"]))
    assert stored.count == 200
    assert frechet_distance(stored, other) == pytest.approx(frechet_distance(one, other), rel=1e-5)


def test_one_image_or_damaged_features_are_refused() -> None:
    with pytest.raises(ValueError, match="at least two"):
        gaussian_of(features(1))
    with pytest.raises(ValueError, match="not finite"):
        gaussian_of(np.full((3, 2), np.nan))
