"""Figures of a set of images against the training images, in the features of one network.

Fréchet distance (Heusel et al., 2017): each set is a Gaussian of its features, and the distance is equation 6 of the
paper. Improved precision and recall (Kynkäänniemi et al., 2019, equations 1 and 2): a set stands for the union of balls
around its features that reach to their k-th nearest neighbors in it. Precision is the share of generated images inside
that of real ones, recall the share of real images inside that of generated ones. All depend on the feature network and
on the number of images, so a figure is named with both (`fd_efficientnet_lite0`, N = 512; `fid_inception_50k`).

METRICS has a row for each figure, and needs no torch. The kernel distance and the Inception score draw as
torch-fidelity does, so both programs find the same values from the same features and seed.
Shapes: N images of a set, R reference images, D features, C classes.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from itertools import pairwise
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from components.configuration.config import Config

if TYPE_CHECKING:
    from torch import Tensor

GROUPS = 16  # groups of images, each left out once for a standard error
NEIGHBORS = 3  # k of the paper
BLOCK = 256  # rows of distances at a time
SUBSETS, SUBSET = 100, 1000  # parts of a kernel distance, and most images of a part
SPLITS = 10  # parts of an Inception score
ROUNDING = 1e-12  # of a squared distance in float64, relative to the squared features


Purpose = Literal["model", "scale"]  # images of a model, or images that calibrate the distances


class Gaussian(NamedTuple):
    """Mean and covariance of a set's features, all that the Fréchet distance reads."""

    mean: np.ndarray  # (D,) float64
    root: np.ndarray  # (D, min(N, D)) float64; times its transpose, it is the covariance


class PrecisionRecall(NamedTuple):
    """Precision and recall of generated images against real images, shares in [0, 1]."""

    precision: float  # how many generated images look real
    recall: float  # how many real images could have been generated


@dataclass
class Compared:
    """A set of images beside the reference: features, and values that several metrics share."""

    features: np.ndarray  # (N, D) of the set
    references: np.ndarray  # (R, D); empty where the Gaussian alone is known
    reference: Gaussian
    _: KW_ONLY
    seed: int  # of the draws of equal numbers of images
    logits: np.ndarray | None = None  # (N, C) of a classifier

    def images(self, reads: "Reads") -> int:
        """Number of images of the smallest set that a metric reads."""
        counts = {"gaussian": len(self.features), "logits": 0 if self.logits is None else len(self.logits)}
        return counts.get(reads, min(len(self.features), len(self.references)))

    @cached_property
    def neighbors(self) -> PrecisionRecall:
        """Precision and recall of equal numbers of images, drawn at random where there are more."""
        drawn, count = np.random.default_rng(self.seed), min(len(self.features), len(self.references))
        real, made = (each[drawn.permutation(len(each))[:count]] for each in (self.references, self.features))
        return precision_recall(real, made)

    def distance(self) -> float:
        """Fréchet distance of the set to the reference."""
        return frechet_distance(gaussian_of(self.features), self.reference)

    def kernel_distance(self) -> float:
        """KID: the squared distance of means under the kernel (x y / D + 1)³, unbiased.
        The mean over random parts of both sets (Bińkowski et al., 2018, "Demystifying MMD GANs", section 4)."""
        draws = np.random.RandomState(self.seed)
        made, real = (_in_float64(each) for each in (self.features, self.references))
        size, values = min(SUBSET, len(made), len(real)), []
        for _ in range(SUBSETS):
            x, y = (each[draws.choice(len(each), size, replace=False)] for each in (made, real))
            xx, yy, xy = ((one @ other.T / x.shape[1] + 1) ** 3 for one, other in ((x, x), (y, y), (x, y)))
            within = (xx.sum() - xx.trace() + yy.sum() - yy.trace()) / (size * (size - 1))
            values.append(float(within - 2 * xy.mean()))
        return float(np.mean(values))

    def inception_score(self) -> float:
        """exp(E KL(p(y|x) || p(y))) of a classifier's classes y, the mean over SPLITS parts of the set.
        Salimans et al., 2016, "Improved Techniques for Training GANs", section 4."""
        assert self.logits is not None
        order = np.random.RandomState(self.seed).permutation(len(self.logits))
        logs = _in_float64(self.logits[order]).log_softmax(dim=1)
        ends = [part * len(order) // SPLITS for part in range(SPLITS + 1)]
        parts = [logs[start:end] for start, end in pairwise(ends)]
        gains = [(part.exp() * (part - part.exp().mean(dim=0).log())).sum(dim=1).mean() for part in parts]
        return float(np.mean([float(gain.exp()) for gain in gains]))


Reads = Literal["gaussian", "features", "logits"]


class Metric(NamedTuple):
    """A figure of a set of images: a column of reports and comparisons, and a metric in MLflow."""

    title: str  # of the column
    measure: Callable[[Compared], float]
    images: int = 2  # of either set, at least; a smaller set has no such figure
    share: bool = True  # of independent images, in [0, 1]
    digits: int = 2  # behind the point
    headline: bool = False  # also among the few figures of a row of the lecture
    prefix: str = ""  # of names in MLflow; empty: the name of the metric
    reads: Reads = "features"  # "gaussian": of the reference; "logits": of the set alone
    usual: bool = True  # False: only where a recipe or a command names it


METRICS: dict[str, Metric] = {
    "distance": Metric("Fréchet distance", Compared.distance, share=False, digits=1, headline=True, reads="gaussian"),
    "precision": Metric("Precision", attrgetter("neighbors.precision"), images=NEIGHBORS + 1),
    "recall": Metric("Recall", attrgetter("neighbors.recall"), images=NEIGHBORS + 1),
    "kid": Metric("KID", Compared.kernel_distance, share=False, digits=5, usual=False),
    "inception_score": Metric(
        "Inception score", Compared.inception_score, SPLITS, share=False, prefix="is", reads="logits", usual=False
    ),
}
USUAL = tuple(name for name, metric in METRICS.items() if metric.usual)
# Distance and protocol in names.
PUBLISHED = {"inception": ("fid", "inception"), "inception_clean": ("fid", "clean"), "dinov2": ("fd", "dinov2")}


class DistanceRow(Config, extra="allow"):
    """Measured figures of a set: the Fréchet distance, and any other of METRICS by its name."""

    name: str
    distance: float
    samples: int  # N
    purpose: Purpose
    standard_error: float | None = None  # of the distance, over images (`distance_error`)
    compared: int | None = None  # images of either set, of the figures that read equal numbers; None: N

    def figure(self, metric: str) -> float | None:
        """Value of a metric; None if it was not measured."""
        return getattr(self, metric, None)

    def error(self, metric: str) -> float | None:
        """Standard error of a metric over images; of a share, that of so many independent images."""
        if metric == "distance":
            return self.standard_error
        share = self.figure(metric) if METRICS[metric].share else None
        return None if share is None else share_error(share, self.compared or self.samples)

    def metrics(self, network: str) -> dict[str, float]:
        """Measured figures by name in MLflow: letters, digits and underscores only."""
        name = re.sub(r"[^a-z0-9]+", "_", self.name.lower().replace("²", "")).strip("_")
        return {f"{figure}_{name}": value for figure, value in self.published(network).items()}

    def published(self, network: str) -> dict[str, float]:
        """Measured figures by names with network and protocol: `fid_inception_50k`."""
        equal = self.compared or self.samples
        values = {
            published_name(key, network, equal if metric.reads == "features" else self.samples): self.figure(key)
            for key, metric in METRICS.items()
        }
        return {name: value for name, value in values.items() if value is not None}


def measured_row(name: str, purpose: Purpose, compared: Compared, metrics: Sequence[str] = ()) -> DistanceRow:
    """The figures of a set; None where more images are needed. Raises ValueError for a single image."""
    if len(compared.features) < 2:
        raise ValueError(f"a distance needs at least two images, and {name} has {len(compared.features)}")
    chosen = {metric: METRICS[metric] for metric in ("distance", *metrics)}
    figures: dict[str, Any] = dict.fromkeys(chosen)
    for metric_name, metric in chosen.items():
        if compared.images(metric.reads) >= metric.images:
            figures[metric_name] = metric.measure(compared)
    if "distance" in metrics:
        figures["standard_error"] = distance_error(compared.features, compared.reference, seed=compared.seed)
    facts: dict[str, Any] = {"name": name, "samples": len(compared.features), "purpose": purpose}
    if 0 < len(compared.references) < len(compared.features):
        facts["compared"] = len(compared.references)
    return DistanceRow.model_validate(figures | facts)


def distance_name(network: str) -> str:
    """Name of the Fréchet distance in a network's features: `fd_efficientnet_lite0`, `fid_inception`."""
    return "_".join(PUBLISHED.get(network, ("fd", network)))


def published_name(metric: str, network: str, samples: int) -> str:
    """Name of a figure with its network; of a protocol of papers with N as well: `fid_inception_50k`."""
    distance, protocol = PUBLISHED.get(network, ("fd", network))
    name = f"{distance if metric == 'distance' else METRICS[metric].prefix or metric}_{protocol}"
    return f"{name}_{counted(samples)}" if network in PUBLISHED else name


def counted(samples: int) -> str:
    """N in the name of a figure: 50k, 1234."""
    return str(samples) if samples % 1000 else f"{samples // 1000}k"


def gaussian_from(mean: np.ndarray, covariance: np.ndarray) -> Gaussian:
    """The Gaussian of a published mean (D,) and covariance (D, D).
    Raises ValueError for other shapes or values that are not finite."""
    if mean.ndim != 1 or covariance.shape != 2 * mean.shape or not np.isfinite(covariance.sum() + mean.sum()):
        raise ValueError(f"statistics of shapes {mean.shape} and {covariance.shape} are no mean and covariance")
    values, vectors = np.linalg.eigh(covariance.astype(np.float64))
    return Gaussian(mean.astype(np.float64), vectors * np.sqrt(values.clip(min=0)))


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
    return Gaussian(mean, factor.T / np.sqrt(len(values) - 1))


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
    adds to every distance is the same in all g, so it moves the mean and not the error."""
    if len(features) < 2 * GROUPS:
        return None
    values = features.astype(np.float64)
    rooted = values @ reference.root
    group = np.random.default_rng(seed).permutation(len(values)) % GROUPS
    kept = [group != left_out for left_out in range(GROUPS)]
    distances = [_distance_of_rooted(values[k], rooted[k], reference) for k in kept]
    return float(np.sqrt((GROUPS - 1) * np.var(distances)))


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
    halves = order[:middle], order[middle : 2 * middle]
    return frechet_distance(*(gaussian_of(features[half]) for half in halves))


def share_error(share: float, count: int) -> float:
    """Standard error of a share of `count` independent images: a binomial sample."""
    return (share * (1 - share) / count) ** 0.5


def precision_recall(real: np.ndarray, generated: np.ndarray, *, neighbors: int = NEIGHBORS) -> PrecisionRecall:
    """Precision and recall from features (N, D) of real and (M, D) of generated images, in float64.
    Both grow with the number of images. Raises ValueError for sets of no more images than `neighbors`."""
    if min(len(real), len(generated)) <= neighbors:
        raise ValueError(f"precision and recall need more than {neighbors} images of either set")
    one, other = (_in_float64(features) for features in (real, generated))
    return PrecisionRecall(_share_inside(other, one, neighbors), _share_inside(one, other, neighbors))


def nearest_images(features: np.ndarray, references: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Number (N,) of the nearest of references (R, D) for each of features (N, D), and the distance (N,)."""
    parts, others = np.split(features, range(BLOCK, len(features), BLOCK)), _in_float64(references)
    distances, numbers = zip(*(_distances(_in_float64(part), others).min(dim=1) for part in parts), strict=True)
    one, other = (np.concatenate([part.cpu().numpy() for part in parts]) for parts in (numbers, distances))
    return one, other


def _in_float64(values: np.ndarray) -> "Tensor":
    import torch

    from components.sampling.device import best_device

    return torch.from_numpy(values.astype(np.float64)).to(best_device())


def _share_inside(points: "Tensor", centers: "Tensor", neighbors: int) -> float:
    """Share of points (M, D) inside any ball of a center (N, D) and the center's k-th nearest neighbor."""
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
