"""Laws of precision and recall, and of the error of a distance."""

import numpy as np
import pytest

from components.evaluation import precision_recall as module
from components.evaluation.distance import distance_error, frechet_distance, gaussian_of
from components.evaluation.image_sets import REFERENCE
from components.evaluation.measure import distance_row, refined_row
from components.evaluation.precision_recall import precision_recall


def normal(count: int, *, dims: int = 5, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, dims)).astype(np.float32)


def naive(points: np.ndarray, centers: np.ndarray, neighbors: int) -> float:
    """Equations 1 and 2 of the paper, feature by feature."""
    found = []
    for point in points.astype(np.float64):
        inside = False
        for center in centers.astype(np.float64):
            reach = sorted(np.linalg.norm(center - other) for other in centers.astype(np.float64))[neighbors]
            inside = inside or bool(np.linalg.norm(point - center) <= reach)
        found.append(inside)
    return float(np.mean(found))


@pytest.mark.parametrize("neighbors", [1, 3])
def test_both_are_the_equations_of_the_paper_whatever_the_block(
    neighbors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, generated = normal(23), 0.7 * normal(17, seed=1) + 0.5
    expected = naive(generated, real, neighbors), naive(real, generated, neighbors)
    assert 0 < min(expected) < max(expected) < 1
    for block in (256, 4):
        monkeypatch.setattr(module, "BLOCK", block)
        assert precision_recall(real, generated, neighbors=neighbors) == pytest.approx(expected)


def test_a_set_has_all_of_itself_and_nothing_of_what_is_far_away() -> None:
    features = normal(60, dims=40)
    twice = np.concatenate([features, features, features, features, features])  # radii of zero
    assert precision_recall(features, features) == precision_recall(twice, twice) == (1, 1)
    assert precision_recall(features, features[::-1] + 100) == (0, 0)


def test_a_part_of_the_set_is_precise_and_a_wider_set_recalls_it() -> None:
    clusters = np.concatenate([normal(50), normal(50, seed=1) + 50])
    one = normal(100, seed=2)
    assert precision_recall(clusters, one).precision > 0.8
    assert precision_recall(clusters, one).recall == pytest.approx(0.5, abs=0.1)
    swapped = precision_recall(one, clusters)
    assert swapped == precision_recall(clusters, one)[::-1]


def test_too_few_images_are_refused() -> None:
    with pytest.raises(ValueError, match="more than 3 images"):
        precision_recall(normal(3), normal(9))


@pytest.mark.parametrize(("count", "dims"), [(160, 4), (160, 200)])
def test_the_error_is_the_deviation_of_the_distance_of_other_samples(count: int, dims: int) -> None:
    """Both where images and where dimensions are fewer."""
    reference = gaussian_of(normal(2000, dims=dims, seed=9))
    sets = [1.5 * normal(count, dims=dims, seed=seed) + 0.5 for seed in range(100, 140)]
    true = np.std([frechet_distance(gaussian_of(each), reference) for each in sets], ddof=1)
    errors = [distance_error(each, reference, seed=0) for each in sets]
    assert None not in errors
    assert np.mean([error or 0.0 for error in errors]) == pytest.approx(true, rel=0.3)


def test_few_images_have_no_error() -> None:
    assert distance_error(normal(31), gaussian_of(normal(100, seed=1)), seed=0) is None
    assert distance_error(normal(32), gaussian_of(normal(100, seed=1)), seed=0) is not None


def test_a_row_compares_as_many_training_images_as_there_are_samples() -> None:
    features = {REFERENCE: normal(400), "made": 2 * normal(100, seed=1), "two": normal(2, seed=2)}
    reference = gaussian_of(features[REFERENCE])
    made, two = (
        refined_row(distance_row(name, vectors, reference, "model"), vectors, features[REFERENCE], reference, seed=0)
        for name, vectors in features.items()
        if name != REFERENCE
    )
    drawn = np.random.default_rng(0).permutation(400)[:100]
    assert (made.precision, made.recall) == precision_recall(features[REFERENCE][drawn], features["made"])
    assert set(made.metrics("net")) == {"fd_net_made", "precision_net_made", "recall_net_made"}
    assert (two.standard_error, two.precision, two.recall) == (None, None, None)
    assert set(two.metrics("net")) == {"fd_net_two"}
