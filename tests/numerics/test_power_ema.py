"""Laws of averages by a power of time, and of their reconstruction after training."""

import numpy as np
import pytest
import torch
from torch import nn

from components.training.optim import (
    EMA,
    WIDTHS,
    EMAProfile,
    combine,
    correlations,
    gamma_of,
    nearest_first,
    posthoc_factors,
    power_decay_at,
    power_decays,
)

UPDATES, EVERY = 400, 25


def shares(updates: int, sigma_rel: float) -> np.ndarray:
    """What an average after so many updates has of the weights after each of them: a telescope of the decays."""
    power = gamma_of(sigma_rel) + 1
    edges = (np.arange(updates + 1) / updates) ** power
    return np.diff(edges)


def walk() -> torch.Tensor:
    """Weights after each update: a drift and a random walk, (UPDATES, 5)."""
    steps = torch.randn(UPDATES, 5, dtype=torch.float64)
    return steps.cumsum(0) * 0.05 + torch.linspace(0, 1, UPDATES, dtype=torch.float64)[:, None]


def tracked(weights: torch.Tensor, *, sigma_rel: float = 0.1) -> tuple[EMA, dict[EMAProfile, dict[str, torch.Tensor]]]:
    network = nn.Linear(5, 1, bias=False).double()
    ema, snapshots = EMA(network, power_decays(sigma_rel)), {}
    for update, row in enumerate(weights, 1):
        with torch.no_grad():
            network.weight.copy_(row[None])
        ema.update(network)
        if update % EVERY == 0:
            for width, average in zip(nearest_first(sigma_rel), ema.averages.values(), strict=True):
                kept = {name: tensor.clone() for name, tensor in average.state_dict().items()}
                snapshots[EMAProfile(update, width)] = kept
    return ema, snapshots


def test_exponents_are_the_published_ones_and_give_their_widths_and_others_are_refused() -> None:
    assert gamma_of(0.05) == pytest.approx(16.97, abs=5e-3)
    assert gamma_of(0.10) == pytest.approx(6.94, abs=5e-3)
    for sigma_rel in (0.0, 0.3, -1.0):
        with pytest.raises(ValueError, match="must be in"):
            gamma_of(sigma_rel)
    for sigma_rel in (0.01, 0.05, 0.1, 0.25):
        updates = np.arange(1, 200_001)
        share = shares(200_000, sigma_rel)
        mean = (share * updates).sum()
        assert ((share * (updates - mean) ** 2).sum()) ** 0.5 / 200_000 == pytest.approx(sigma_rel, rel=1e-4)


def test_a_tracked_average_has_the_shares_of_its_profile_and_nothing_of_the_initialization() -> None:
    weights = walk()
    ema, _ = tracked(weights)
    for width, average in zip(nearest_first(0.1), ema.averages.values(), strict=True):
        wanted = torch.from_numpy(shares(UPDATES, width)) @ weights
        torch.testing.assert_close(average.weight[0].double(), wanted, rtol=0, atol=1e-5)
    assert power_decay_at(1, gamma=3.0) == 0


def test_the_average_nearest_to_the_wanted_width_is_the_one_that_previews_see() -> None:
    for sigma_rel, nearest in ((0.02, 0.05), (0.06, 0.05), (0.09, 0.10), (0.2, 0.10)):
        ema = EMA(nn.Linear(2, 2), power_decays(sigma_rel))
        assert nearest_first(sigma_rel)[0] == nearest
        assert ema.network is ema.averages["ema"]
        assert ema.decays["ema"](torch.tensor(9.0)) == power_decay_at(torch.tensor(9.0), gamma=gamma_of(nearest))
        assert sorted(nearest_first(sigma_rel)) == sorted(WIDTHS)


def test_correlations_are_inner_products_of_the_profiles() -> None:
    a, b = EMAProfile(300, 0.05), EMAProfile(400, 0.1)
    time = (np.arange(4_000_000) + 0.5) / 10_000  # to 400

    def profile(of: EMAProfile) -> np.ndarray:
        gamma = gamma_of(of.sigma_rel)
        return np.where(time <= of.updates, (gamma + 1) * time**gamma / float(of.updates) ** (gamma + 1), 0)

    inner = (profile(a) * profile(b)).sum() / 10_000
    assert correlations([a], [b])[0, 0] == pytest.approx(inner, rel=1e-6)
    assert correlations([b], [a])[0, 0] == pytest.approx(inner, rel=1e-6)
    assert correlations([a], [a])[0, 0] == pytest.approx((profile(a) ** 2).sum() / 10_000, rel=1e-6)


def test_reconstructing_a_stored_profile_returns_it() -> None:
    _, snapshots = tracked(walk())
    for width in WIDTHS:
        weights = posthoc_factors([*snapshots], width)
        stored = [profile == EMAProfile(UPDATES, width) for profile in snapshots]
        np.testing.assert_allclose(weights, np.array(stored, float), atol=1e-6)
        found = combine(snapshots.values(), posthoc_factors([*snapshots], width))["weight"]
        torch.testing.assert_close(found, snapshots[EMAProfile(UPDATES, width)]["weight"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("sigma_rel", [0.07, 0.085, 0.12, 0.15])
def test_a_reconstructed_average_is_the_one_that_was_not_tracked(sigma_rel: float) -> None:
    weights = walk()
    _, snapshots = tracked(weights)
    wanted = torch.from_numpy(shares(UPDATES, sigma_rel)) @ weights
    found = combine(snapshots.values(), posthoc_factors([*snapshots], sigma_rel))["weight"][0].double()
    stored = [snapshots[EMAProfile(UPDATES, width)]["weight"][0].double() for width in WIDTHS]
    assert (found - wanted).abs().max() < 0.05 * min((each - wanted).abs().max() for each in stored)


def test_factors_add_up_to_one_and_are_of_a_snapshot_at_least() -> None:
    kept = [EMAProfile(update, width) for update in (100, 200, 300) for width in WIDTHS]
    assert posthoc_factors(kept, 0.07).sum() == pytest.approx(1)
    with pytest.raises(ValueError, match="there is no snapshot"):
        posthoc_factors([], 0.07)


def test_buffers_are_those_of_the_last_snapshot() -> None:
    snapshots = {
        EMAProfile(10, 0.05): {"weight": torch.ones(2), "count": torch.tensor(1)},
        EMAProfile(20, 0.05): {"weight": torch.zeros(2), "count": torch.tensor(2)},
    }
    assert combine(snapshots.values(), posthoc_factors([*snapshots], 0.05))["count"] == 2
