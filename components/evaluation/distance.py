"""Fréchet distance between two sets of images in a feature space (Heusel et al., 2017).

Each set is a Gaussian of its features, and the distance is equation 6 of the paper.

Always named with its feature network and the number of images (`fd_efficientnet_lite0`, N = 512): distances in other
features, or of other numbers of images, are other quantities.

Shapes: N images, D features.
"""

import io
from typing import NamedTuple

import numpy as np

GROUPS = 16  # groups of images, each left out once for a standard error


class Gaussian(NamedTuple):
    """Mean and covariance of a set's features, all that the Fréchet distance reads."""

    mean: np.ndarray  # (D,) float64
    covariance: np.ndarray  # (D, D) float64
    count: int


def gaussian_of(features: np.ndarray) -> Gaussian:
    """Mean and unbiased covariance of features (N, D).

    Raises ValueError below two images, or if the features are not finite.
    """
    if len(features) < 2:
        raise ValueError(f"a distance needs at least two images, not {len(features)}")
    if not np.isfinite(features).all():
        raise ValueError("features are not finite: the images or the feature network are damaged")
    values = features.astype(np.float64)
    return Gaussian(values.mean(axis=0), np.cov(values, rowvar=False).reshape(values.shape[1], -1), len(values))


def frechet_distance(one: Gaussian, other: Gaussian) -> float:
    """|m - n|^2 + tr(A + B - 2 (A B)^(1/2)), in float64.

    The trace of the root comes from the symmetric A^(1/2) B A^(1/2), which has the eigenvalues of A B: no general
    matrix root and no imaginary rest. Symmetric up to rounding; zero, up to rounding, for equal sets.
    """
    root = _square_root(one.covariance)
    product = root @ other.covariance @ root
    trace_of_root = np.sqrt(np.linalg.eigvalsh(product).clip(min=0)).sum()
    difference = one.mean - other.mean
    traces = np.trace(one.covariance) + np.trace(other.covariance)
    return float(max(0.0, difference @ difference + traces - 2 * trace_of_root))


def distance_error(features: np.ndarray, reference: Gaussian, *, seed: int) -> float | None:
    """Standard error of the distance of a set (N, D) to a reference that is taken as exact.

    None below 2 GROUPS images.

    The delete-a-group jackknife (Shao & Wu, 1989): the images are cut at random into g = GROUPS groups, the distance is
    taken g times with one of them left out, and its variance is (g - 1) / g times the sum of squared differences from
    the mean. It says how far other samples of the same model would measure, not other trainings of it. What a small N
    adds to every distance is the same in all g, so it moves the mean and not the error.
    """
    if len(features) < 2 * GROUPS:
        return None
    values, root = features.astype(np.float64), _square_root(reference.covariance)
    rooted, group = values @ root, np.random.default_rng(seed).permutation(len(values)) % GROUPS
    found = [
        _distance_of_rooted(values[group != left_out], rooted[group != left_out], reference)
        for left_out in range(GROUPS)
    ]
    return float(np.sqrt((GROUPS - 1) * np.var(found)))


def _distance_of_rooted(values: np.ndarray, rooted: np.ndarray, reference: Gaussian) -> float:
    """Fréchet distance of a set (n, D) to the reference, by features and `rooted`, (n, D).

    `rooted` is the features times the root of the covariance of the reference.

    The eigenvalues of A^(1/2) B A^(1/2) are those of a product of `rooted` with itself, of the smaller size.
    """
    mean, count = values.mean(axis=0), len(values) - 1
    centered = rooted - rooted.mean(axis=0)
    product = centered @ centered.T if count < values.shape[1] else centered.T @ centered
    trace_of_root = np.sqrt(np.linalg.eigvalsh(product / count).clip(min=0)).sum()
    traces = ((values - mean) ** 2).sum() / count + np.trace(reference.covariance)
    return float(((mean - reference.mean) ** 2).sum() + traces - 2 * trace_of_root)


def distance_of_halves(features: np.ndarray, *, seed: int) -> float:
    """Distance between two random halves of a set (N, D), the value of equal models at N / 2 images."""
    order = np.random.default_rng(seed).permutation(len(features))
    middle = len(order) // 2
    return frechet_distance(gaussian_of(features[order[:middle]]), gaussian_of(features[order[middle : 2 * middle]]))


def pack_gaussian(gaussian: Gaussian) -> bytes:
    """Packs a Gaussian as npz.

    float32 keeps a distance to about seven digits in half of the space.
    """
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        mean=gaussian.mean.astype(np.float32),
        covariance=gaussian.covariance.astype(np.float32),
        count=gaussian.count,
    )
    return buffer.getvalue()


def _square_root(covariance: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(covariance)
    return (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
