"""Power-function EMA: averages with a relative width, and any other width from them after training.

Karras et al. (2024), "Analyzing and Improving the Training Dynamics of Diffusion Models", section 3 and appendix C. An
average of width s (sigma_rel) looks back over a share of training, however long: it weighs the weights after update k
in proportion to k^gamma. Two averages are tracked, of widths 0.05 and 0.10, and stored now and then as snapshots; a
linear combination of snapshots is the average of any width, to be chosen after training.

Shapes: N snapshots."""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from torch import Tensor

from components.training.optim import Decays

WIDTHS = (0.05, 0.10)  # sigma_rel of the tracked averages, as published
CUTOFF = 1e-13  # relative size of singular values that are nothing but rounding


class EMAProfile(NamedTuple):
    """Moment and width of an average."""

    updates: int  # of the optimizer, up to the moment
    sigma_rel: float  # standard deviation of the profile over `updates`, in (0, 0.28)


def power_decays(sigma_rel: float) -> Decays:
    """Decays of both averages under their names in checkpoints; the first is nearest to `sigma_rel`."""
    named = zip(("ema", "second_ema"), nearest_first(sigma_rel), strict=True)
    return {name: partial(decay_at, gamma=gamma_of(width)) for name, width in named}


def nearest_first(sigma_rel: float) -> list[float]:
    """The tracked widths, by distance from `sigma_rel`."""
    return sorted(WIDTHS, key=lambda width: abs(width - sigma_rel))


def gamma_of(sigma_rel: float) -> float:
    """The exponent of a profile by width (equation 126): 16.97 for 0.05, 6.94 for 0.10.
    Raises ValueError outside (0, 0.28), where no profile exists."""
    if not 0 < sigma_rel < 0.28:
        raise ValueError(f"the width of an average, sigma_rel, must be in (0, 0.28), not {sigma_rel}")
    inverse = sigma_rel**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


def decay_at(update: Tensor, *, gamma: float) -> Tensor:
    """The decay of update number `update`, () float64, 1-based (equation 127).
    0 for the first, so that nothing stays of the initialization."""
    return (1 - 1 / update) ** (gamma + 1)


def correlations(rows: Sequence[EMAProfile], columns: Sequence[EMAProfile]) -> np.ndarray:
    """Inner products of profiles as functions of time (equation 151), (len(rows), len(columns)) float64."""
    t_a, t_b = np.array([[p.updates for p in rows]], float).T, np.array([[p.updates for p in columns]], float)
    gamma_a = np.array([[gamma_of(p.sigma_rel) for p in rows]]).T
    gamma_b = np.array([[gamma_of(p.sigma_rel) for p in columns]])
    ratio = (t_a / t_b) ** np.where(t_a < t_b, gamma_b, -gamma_a)  # earlier over later, to the power of the later one
    return (gamma_a + 1) * (gamma_b + 1) * ratio / ((gamma_a + gamma_b + 1) * np.maximum(t_a, t_b))


def coefficients(snapshots: Sequence[EMAProfile], target: EMAProfile) -> np.ndarray:
    """Factors of snapshots, (N,) float64 with sum 1, for a target profile by least squares (algorithm 3).
    Snapshots later than the target get 0: they hold updates that it must not. Raises ValueError where none is left."""
    usable = [index for index, profile in enumerate(snapshots) if profile.updates <= target.updates]
    if not usable:
        raise ValueError(f"there is no snapshot up to update {target.updates}")
    profiles = [snapshots[index] for index in usable]
    products = correlations(profiles, [target])[:, 0]
    solution, *_ = np.linalg.lstsq(correlations(profiles, profiles), products, rcond=CUTOFF)
    weights = np.zeros(len(snapshots))
    weights[usable] = solution / solution.sum()
    return weights


def combine(snapshots: Iterable[Mapping[str, Tensor]], weights: np.ndarray) -> dict[str, Tensor]:
    """The linear combination of snapshots, read in turn and added in float64, as fp32.
    Tensors without floating-point numbers are those of the last snapshot."""
    total: dict[str, Tensor] = {}
    for snapshot, weight in zip(snapshots, weights.tolist(), strict=True):
        for name, tensor in snapshot.items():
            added = weight * tensor.double() if tensor.is_floating_point() else tensor
            total[name] = total[name] + added if name in total and tensor.is_floating_point() else added
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in total.items()}


def posthoc_ema(
    profiles: Sequence[EMAProfile], snapshots: Iterable[Mapping[str, Tensor]], sigma_rel: float
) -> dict[str, Tensor]:
    """The average of width `sigma_rel` at the moment of the last snapshot.

    Args:
        profiles: width and moment of each snapshot.
        snapshots: weights by name in the same order; read in turn.

    Raises ValueError for a width without a profile, or where there is no snapshot."""
    last = max((profile.updates for profile in profiles), default=0)
    return combine(snapshots, coefficients(profiles, EMAProfile(last, sigma_rel)))
