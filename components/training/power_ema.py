"""Averages of the weights by a power of time, and any other one from them after training (Karras et al. 2024,
"Analyzing and Improving the Training Dynamics of Diffusion Models", section 3 and appendix C).

An average of width s (sigma_rel) looks back over a share of training that does not depend on its length: it weighs the
weights after update k in proportion to k^gamma. Two of them are tracked, of widths 0.05 and 0.10, and kept now and then
as snapshots; a linear combination of these is the average of whatever width one wants, which nobody has to know before.

Shapes: N snapshots.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from typing import Generic, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from components.training.optim import Network, move_average, no_updates

WIDTHS = (0.05, 0.10)  # sigma_rel of the averages that are tracked, as published
CUTOFF = 1e-13  # relative size of the singular values that rounding has left nothing of


class EMAProfile(NamedTuple):
    """Which average of which moment."""

    updates: int  # of the optimizer, all that there were
    sigma_rel: float  # standard deviation of the profile over `updates`, in (0, 0.28)


class PowerEMA(Generic[Network]):
    """The two averages of a network's weights, each a network of its own in evaluation mode. Buffers are copied.

    Args:
        sigma_rel: the width that is wanted in the end. The tracked average that is nearest to it comes first: it is
            `network`, which previews and evaluations use.
        copied: makes another network of the same weights.
    """

    def __init__(self, network: Network, *, sigma_rel: float, copied: Callable[[Network], Network] = deepcopy) -> None:
        self.updates = no_updates(network)
        self.widths = nearest_first(sigma_rel)
        self.gammas = [gamma_of(width) for width in self.widths]
        self.networks = [copied(network).float().eval().requires_grad_(False) for _ in self.widths]
        self.network = self.networks[0]

    @property
    def averages(self) -> dict[str, Network]:
        """By the names that checkpoints know them by."""
        return {"ema": self.networks[0], "second_ema": self.networks[1]}

    def update(self, network: nn.Module, taken: Tensor | None = None) -> None:
        """Move the averages towards `network`; call after an optimizer step. Nothing moves where `taken`, () bool on
        the network's device, is false."""
        taken = torch.ones_like(self.updates, dtype=torch.bool) if taken is None else taken
        self.updates += taken
        for average, gamma in zip(self.networks, self.gammas, strict=True):
            weight = 1 - decay_at(self.updates, gamma=gamma)
            move_average(average, network, weight=weight, taken=taken)


def nearest_first(sigma_rel: float) -> list[float]:
    """The tracked widths in the order of their distance to `sigma_rel`."""
    return sorted(WIDTHS, key=lambda width: abs(width - sigma_rel))


def gamma_of(sigma_rel: float) -> float:
    """The exponent of the profile of that width (equation 126): 16.97 for 0.05, 6.94 for 0.10.

    Raises ValueError outside (0, 0.28), where there is none.
    """
    if not 0 < sigma_rel < 0.28:
        raise ValueError(f"the width of an average, sigma_rel, must be in (0, 0.28), not {sigma_rel}")
    inverse = sigma_rel**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


def decay_at(update: Tensor, *, gamma: float) -> Tensor:
    """The decay of update `update`, () float64, 1-based (equation 127): 0 for the first, so that nothing stays of the
    initialization."""
    return (1 - 1 / update) ** (gamma + 1)


def correlations(rows: Sequence[EMAProfile], columns: Sequence[EMAProfile]) -> np.ndarray:
    """Inner products of profiles as functions of time (equation 151), (len(rows), len(columns)) float64."""
    t_a, t_b = np.array([[p.updates for p in rows]], float).T, np.array([[p.updates for p in columns]], float)
    gamma_a = np.array([[gamma_of(p.sigma_rel) for p in rows]]).T
    gamma_b = np.array([[gamma_of(p.sigma_rel) for p in columns]])
    ratio = (t_a / t_b) ** np.where(t_a < t_b, gamma_b, -gamma_a)  # earlier over later, to the power of the later one
    return (gamma_a + 1) * (gamma_b + 1) * ratio / ((gamma_a + gamma_b + 1) * np.maximum(t_a, t_b))


def coefficients(kept: Sequence[EMAProfile], wanted: EMAProfile) -> np.ndarray:
    """What to multiply the snapshots by, (N,) float64 with sum 1: the wanted profile by least squares (algorithm 3).

    Snapshots of later moments than the wanted one know too much and get 0. Raises ValueError where none is left.
    """
    usable = [index for index, profile in enumerate(kept) if profile.updates <= wanted.updates]
    if not usable:
        raise ValueError(f"there is no snapshot up to update {wanted.updates}")
    profiles = [kept[index] for index in usable]
    products = correlations(profiles, [wanted])[:, 0]
    solution, *_ = np.linalg.lstsq(correlations(profiles, profiles), products, rcond=CUTOFF)
    weights = np.zeros(len(kept))
    weights[usable] = solution / solution.sum()
    return weights


def combine(snapshots: Iterable[Mapping[str, Tensor]], weights: np.ndarray) -> dict[str, Tensor]:
    """The linear combination of snapshots, taken one by one and added in float64, as fp32.

    Tensors that are no floating-point numbers are those of the last snapshot.
    """
    total: dict[str, Tensor] = {}
    for snapshot, weight in zip(snapshots, weights.tolist(), strict=True):
        for name, tensor in snapshot.items():
            added = weight * tensor.double() if tensor.is_floating_point() else tensor
            total[name] = total[name] + added if name in total and tensor.is_floating_point() else added
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in total.items()}


def posthoc_ema(
    profiles: Sequence[EMAProfile], snapshots: Iterable[Mapping[str, Tensor]], sigma_rel: float
) -> dict[str, Tensor]:
    """The average of width `sigma_rel` at the moment of the last snapshot, from those of other widths and moments.

    Args:
        profiles: width and moment of each snapshot.
        snapshots: weights by name in the same order; taken one by one.

    Raises ValueError for a width that has no profile, or where there is no snapshot.
    """
    last = max((profile.updates for profile in profiles), default=0)
    return combine(snapshots, coefficients(profiles, EMAProfile(last, sigma_rel)))
