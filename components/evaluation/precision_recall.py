"""Improved precision and recall of generated images (Kynkäänniemi et al., 2019, equations 1 and 2).

A set stands for the union of balls around its features that reach to their k-th nearest neighbors in it. Precision is
the share of generated images inside that of real ones, recall the share of real images inside that of generated ones.
Both grow with the number of images, so sets of equal numbers are compared, and only those.

Shapes: N real images, M generated ones, D features.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from components.sampling.device import best_device

NEIGHBORS = 3  # k of the paper
BLOCK = 256  # rows of distances at a time
ROUNDING = 1e-12  # of a squared distance in float64, relative to the squared features


class PrecisionRecall(NamedTuple):
    """Precision and recall of generated images against real images, shares in [0, 1]."""

    precision: float  # in [0, 1]: how many generated images look real
    recall: float  # in [0, 1]: how many real images could have been generated


def precision_recall(real: np.ndarray, generated: np.ndarray, *, neighbors: int = NEIGHBORS) -> PrecisionRecall:
    """Precision and recall from features (N, D) of real and (M, D) of generated images, in float64.

    Raises ValueError for sets of no more images than `neighbors`.
    """
    if min(len(real), len(generated)) <= neighbors:
        raise ValueError(f"precision and recall need more than {neighbors} images of either set")
    one, other = (torch.from_numpy(features.astype(np.float64)).to(best_device()) for features in (real, generated))
    return PrecisionRecall(
        share_inside(other, one, radii(one, neighbors)), share_inside(one, other, radii(other, neighbors))
    )


def radii(features: Tensor, neighbors: int) -> Tensor:
    """Distance of each of the features (N, D) to the k-th nearest neighbor, itself excluded, (N,)."""
    nearest = [distances(part, features).kthvalue(neighbors + 1, dim=1).values for part in features.split(BLOCK)]
    return torch.cat(nearest)  # the nearest of all is the feature itself


def share_inside(points: Tensor, centers: Tensor, reach: Tensor) -> float:
    """Share of points (M, D) inside the ball of radius reach (N,) around any center (N, D)."""
    inside = [(distances(part, centers) <= reach).any(dim=1) for part in points.split(BLOCK)]
    return float(torch.cat(inside).double().mean())


def distances(points: Tensor, others: Tensor) -> Tensor:
    """Euclidean distances, (M, N), by a product of matrices; equal features are at distance zero.

    What rounding leaves between equal features is set to zero.
    """
    scale = points.square().sum(dim=1, keepdim=True) + others.square().sum(dim=1)
    squared = scale - 2 * points @ others.T
    return squared.where(squared > ROUNDING * scale, 0.0).sqrt()
