"""Distance of a known reverse step q(x_{t-1} | x_t) from a Gaussian.

The true step is intractable for images. Of small forward steps it is nearly Gaussian (Sohl-Dickstein et al., 2015,
section 2.2, after Feller, 1949), which is what lets a network learn a mean alone. Shapes: K components, X values.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

DEVIATIONS, VALUES = 8.0, 1601  # half width and points of the grid that densities are summed on
EXPECTED = 81  # values of x_t that an expectation is summed over


class Mixture(NamedTuple):
    """Gaussians of one variance in one dimension, by weight."""

    weights: Tensor  # (K,), positive, of sum 1
    means: Tensor  # (K,)
    variance: float

    def density(self, values: Tensor) -> Tensor:
        """Density (X,) at values (X,)."""
        squares = (values[:, None] - self.means) ** 2 / self.variance
        return (-squares / 2).exp() @ self.weights / math.sqrt(2 * math.pi * self.variance)

    def noised(self, beta: float) -> "Mixture":
        """q(x_t) after one noising step: x_t = sqrt(1 - beta) x_{t-1} + sqrt(beta) z."""
        return Mixture(self.weights, math.sqrt(1 - beta) * self.means, (1 - beta) * self.variance + beta)

    def reversed(self, x_t: float, beta: float) -> "Mixture":
        """q(x_{t-1} | x_t), where this is q(x_{t-1}), by Bayes' rule; beta in (0, 1)."""
        variance = 1 / (1 / self.variance + (1 - beta) / beta)
        means = variance * (self.means / self.variance + math.sqrt(1 - beta) * x_t / beta)
        seen = self.noised(beta)
        logs = self.weights.log() - (x_t - seen.means) ** 2 / (2 * seen.variance)
        return Mixture(logs.softmax(dim=0), means, variance)

    def gaussian(self) -> "Mixture":
        """The Gaussian of the same mean and variance, a mixture of one."""
        mean = self.weights @ self.means
        spread = self.weights @ (self.means - mean) ** 2
        return Mixture(torch.ones(1, dtype=torch.float64), mean[None], self.variance + float(spread))

    def grid(self, points: int, deviations: float = DEVIATIONS) -> Tensor:
        """Evenly spaced values (points,) around the mean."""
        near = self.gaussian()
        return near.means + math.sqrt(near.variance) * torch.linspace(
            -deviations, deviations, points, dtype=torch.float64
        )

    def distance_from_gaussian(self) -> float:
        """Total variation distance from the Gaussian of the same mean and variance, in [0, 1]."""
        values = self.grid(VALUES)
        apart = (self.density(values) - self.gaussian().density(values)).abs()
        return float(apart.sum() * (values[1] - values[0]) / 2)


TWO_PEAKS = Mixture(torch.full((2,), 0.5, dtype=torch.float64), torch.tensor([-1.0, 1.0], dtype=torch.float64), 0.0625)


def mean_distance(before: Mixture, beta: float) -> float:
    """Distance of the reverse step from its Gaussian, expected over q(x_t)."""
    values = before.noised(beta).grid(EXPECTED)
    shares = before.noised(beta).density(values)
    distances = [before.reversed(x_t, beta).distance_from_gaussian() for x_t in values.tolist()]
    return float(shares @ values.new_tensor(distances) / shares.sum())
