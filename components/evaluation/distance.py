"""Fréchet distance between two sets of images, as Gaussians in a feature space (Heusel et al., 2017, equation 6).

Always named with its feature network and the number of images (`fd_efficientnet_lite0`, N = 512): distances in other
features, or of other numbers of images, are other quantities.

Shapes: N images, D features.
"""

import io
from typing import NamedTuple

import numpy as np


class Gaussian(NamedTuple):
    """What the distance knows of a set of images."""

    mean: np.ndarray  # (D,) float64
    covariance: np.ndarray  # (D, D) float64
    count: int


def gaussian_of(features: np.ndarray) -> Gaussian:
    """Mean and unbiased covariance of features (N, D). Raises ValueError below two images or if not finite."""
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


def distance_of_halves(features: np.ndarray, *, seed: int) -> float:
    """The distance between two random halves of one set (N, D): what "the same images" measures at N / 2."""
    order = np.random.default_rng(seed).permutation(len(features))
    middle = len(order) // 2
    return frechet_distance(gaussian_of(features[order[:middle]]), gaussian_of(features[order[middle : 2 * middle]]))


def pack_gaussian(gaussian: Gaussian) -> bytes:
    """As npz; float32 keeps a distance to about seven digits in half of the space."""
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
