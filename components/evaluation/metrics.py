"""Figures of a set of images against the training images, in the features of one network.

Fréchet distance (Heusel et al., 2017): each set is a Gaussian of its features, and the distance is equation 6 of the
paper. Improved precision and recall (Kynkäänniemi et al., 2019, equations 1 and 2): a set stands for the union of balls
around its features that reach to their k-th nearest neighbors in it. Precision is the share of generated images inside
that of real ones, recall the share of real images inside that of generated ones. All depend on the feature network and
on the number of images, so a figure is named with both (`fd_efficientnet_lite0`, N = 512).

METRICS has a row for each figure, and needs no torch. Shapes: N images of a set, R reference images, D features.
"""

import io
from collections.abc import Callable
from functools import cached_property
from operator import attrgetter
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

GROUPS = 16  # groups of images, each left out once for a standard error
NEIGHBORS = 3  # k of the paper
BLOCK = 256  # rows of distances at a time
ROUNDING = 1e-12  # of a squared distance in float64, relative to the squared features


class Gaussian(NamedTuple):
    """Mean and covariance of a set's features, all that the Fréchet distance reads."""

    mean: np.ndarray  # (D,) float64
    root: np.ndarray  # (D, min(N, D)) float64; times its transpose, it is the covariance
    count: int

    @property
    def covariance(self) -> np.ndarray:
        """Unbiased covariance, (D, D)."""
        return self.root @ self.root.T


class PrecisionRecall(NamedTuple):
    """Precision and recall of generated images against real images, shares in [0, 1]."""

    precision: float  # how many generated images look real
    recall: float  # how many real images could have been generated


class Compared:
    """A set of images beside the reference: features, and values that several metrics share."""

    def __init__(self, features: np.ndarray, references: np.ndarray, reference: Gaussian, *, seed: int) -> None:
        """Features (N, D) of the set, (R, D) of the reference with its Gaussian; equal numbers by seed."""
        self.features, self.references, self.reference, self.seed = features, references, reference, seed

    @cached_property
    def neighbors(self) -> PrecisionRecall:
        """Precision and recall of equal numbers of images, drawn at random where there are more."""
        drawn, count = np.random.default_rng(self.seed), min(len(self.features), len(self.references))
        real, made = (each[drawn.permutation(len(each))[:count]] for each in (self.references, self.features))
        return precision_recall(real, made)

    def distance(self) -> float:
        """Fréchet distance of the set to the reference."""
        return frechet_distance(gaussian_of(self.features), self.reference)


class Metric(NamedTuple):
    """A figure of a set of images: a column of reports and comparisons, and a metric in MLflow."""

    title: str  # of the column
    measure: Callable[[Compared], float]
    images: int = 2  # of either set, at least; a smaller set has no such figure
    share: bool = True  # of independent images, in [0, 1]
    digits: int = 2  # behind the point
    headline: bool = False  # also among the few figures of a row of the lecture
    prefix: str = ""  # of names in MLflow; empty: the name of the metric


METRICS: dict[str, Metric] = {
    "distance": Metric("Fréchet distance", Compared.distance, share=False, digits=1, headline=True, prefix="fd"),
    "precision": Metric("Precision", attrgetter("neighbors.precision"), images=NEIGHBORS + 1),
    "recall": Metric("Recall", attrgetter("neighbors.recall"), images=NEIGHBORS + 1),
}


def gaussian_of(features: np.ndarray) -> Gaussian:
    """Mean and unbiased covariance of features (N, D).
    Raises ValueError below two images, or if the features are not finite."""
    if len(features) < 2:
        raise ValueError(f"a distance needs at least two images, not {len(features)}")
    if not np.isfinite(features).all():
        raise ValueError("features are not finite: the images or the feature network are damaged")
    values = features.astype(np.float64)
    mean = values.mean(axis=0)
    factor = np.asarray(np.linalg.qr(values - mean, mode="r"))  # (min(N, D), D)
    return Gaussian(mean, factor.T / np.sqrt(len(values) - 1), len(values))


def frechet_distance(one: Gaussian, other: Gaussian) -> float:
    """|m - n|^2 + tr(A + B - 2 (A B)^(1/2)), in float64.
    With A = R R^T and B = S S^T, the trace of the root is the sum of the singular values of R^T S, as A B has the
    eigenvalues of (R^T S)(R^T S)^T: no matrix root, no imaginary rest, and no D x D matrix for few images. Symmetric up
    to rounding; zero, up to rounding, for equal sets."""
    difference = one.mean - other.mean
    traces = (one.root**2).sum() + (other.root**2).sum()
    return float(max(0.0, difference @ difference + traces - 2 * np.linalg.norm(one.root.T @ other.root, "nuc")))


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
    values = features.astype(np.float64)
    rooted = values @ reference.root
    group = np.random.default_rng(seed).permutation(len(values)) % GROUPS
    kept = [group != left_out for left_out in range(GROUPS)]
    return float(np.sqrt((GROUPS - 1) * np.var([_distance_of_rooted(values[k], rooted[k], reference) for k in kept])))


def _distance_of_rooted(values: np.ndarray, rooted: np.ndarray, reference: Gaussian) -> float:
    """Fréchet distance of a set to the reference; `rooted` is the features (n, D) times its root."""
    mean, count = values.mean(axis=0), len(values) - 1
    centered = rooted - rooted.mean(axis=0)
    product = centered @ centered.T if len(centered) < centered.shape[1] else centered.T @ centered
    trace_of_root = np.sqrt(np.linalg.eigvalsh(product / count).clip(min=0)).sum()
    traces = ((values - mean) ** 2).sum() / count + (reference.root**2).sum()
    return float(((mean - reference.mean) ** 2).sum() + traces - 2 * trace_of_root)


def distance_of_halves(features: np.ndarray, *, seed: int) -> float:
    """Distance between two random halves of a set (N, D), the value of equal models at N / 2 images."""
    order = np.random.default_rng(seed).permutation(len(features))
    middle = len(order) // 2
    return frechet_distance(gaussian_of(features[order[:middle]]), gaussian_of(features[order[middle : 2 * middle]]))


def share_error(share: float, count: int) -> float:
    """Standard error of a share of `count` independent images, that of a binomial sample."""
    return (share * (1 - share) / count) ** 0.5


def pack_gaussian(gaussian: Gaussian) -> bytes:
    """Packs a Gaussian as npz. float32 keeps a distance to about seven digits in half of the space."""
    mean, covariance = gaussian.mean.astype(np.float32), gaussian.covariance.astype(np.float32)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, mean=mean, covariance=covariance, count=gaussian.count)
    return buffer.getvalue()


def precision_recall(real: np.ndarray, generated: np.ndarray, *, neighbors: int = NEIGHBORS) -> PrecisionRecall:
    """Precision and recall from features (N, D) of real and (M, D) of generated images, in float64.
    Both grow with the number of images, so sets of equal numbers are to be compared. Raises ValueError for sets of no
    more images than `neighbors`."""
    import torch

    from components.sampling.device import best_device

    if min(len(real), len(generated)) <= neighbors:
        raise ValueError(f"precision and recall need more than {neighbors} images of either set")
    one, other = (torch.from_numpy(features.astype(np.float64)).to(best_device()) for features in (real, generated))
    return PrecisionRecall(_share_inside(other, one, neighbors), _share_inside(one, other, neighbors))


def _share_inside(points: "Tensor", centers: "Tensor", neighbors: int) -> float:
    """Share of points (M, D) inside any ball of a center (N, D) and its k-th nearest neighbor."""
    import torch

    # The nearest of all is the center itself.
    nearest = [_distances(part, centers).kthvalue(neighbors + 1, dim=1).values for part in centers.split(BLOCK)]
    reach = torch.cat(nearest)  # (N,)
    inside = [(_distances(part, centers) <= reach).any(dim=1) for part in points.split(BLOCK)]
    return float(torch.cat(inside).double().mean())


def _distances(points: "Tensor", others: "Tensor") -> "Tensor":
    """Euclidean distances, (M, N), by a product of matrices; equal features are at distance zero.
    What rounding leaves between equal features is set to zero."""
    scale = points.square().sum(dim=1, keepdim=True) + others.square().sum(dim=1)
    squared = scale - 2 * points @ others.T
    return squared.where(squared > ROUNDING * scale, 0.0).sqrt()
