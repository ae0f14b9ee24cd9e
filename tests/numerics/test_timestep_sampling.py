"""Laws of loss-aware timestep sampling (Nichol and Dhariwal, 2021, section 3.3)."""

import pytest
import torch

from components.models.diffusion.timestep_sampling import KEPT, draw_timesteps, empty_history, probabilities, record

T = 5


def warm(losses: torch.Tensor) -> torch.Tensor:
    history = empty_history(T)
    for _ in range(KEPT):
        history = record(history, timesteps=torch.arange(T), losses=losses)
    return history


def test_until_every_step_has_its_losses_all_are_drawn_alike():
    history = empty_history(T)
    for _ in range(3 * KEPT):
        history = record(history, timesteps=torch.arange(T - 1), losses=torch.rand(T - 1))
        torch.testing.assert_close(probabilities(history), torch.full((T,), 1 / T, dtype=torch.float64))


def test_then_by_the_root_of_the_mean_squared_loss_and_never_not_at_all():
    losses = torch.tensor([4.0, 1.0, 2.0, 0.0, 1.0])
    expected = 0.999 * losses.double() / 8 + 0.001 / T
    torch.testing.assert_close(probabilities(warm(losses)), expected)
    assert probabilities(warm(losses))[3] > 0


def test_the_latest_losses_count_and_old_ones_are_forgotten():
    history = warm(torch.ones(T))
    for loss in range(1, 2 * KEPT + 1):
        history = record(history, timesteps=torch.tensor([2]), losses=torch.tensor([float(loss)]))
    assert history.losses[2].tolist() == [float(loss) for loss in range(KEPT + 1, 2 * KEPT + 1)]
    assert history.losses[1].tolist() == [1.0] * KEPT


def test_a_loss_that_is_not_finite_is_not_recorded_and_the_old_history_stays_as_it_was():
    before = warm(torch.ones(T))
    kept = before.losses.clone()
    after = record(before, timesteps=torch.tensor([0, 1, 1]), losses=torch.tensor([float("nan"), float("inf"), 3.0]))
    assert torch.equal(before.losses, kept)
    assert torch.equal(after.losses[0], kept[0])
    assert after.losses[1].tolist() == [1.0] * (KEPT - 1) + [3.0]


def test_losses_are_recorded_alike_whether_they_come_at_once_or_in_parts():
    timesteps, losses = torch.tensor([1, 1, 2, 1]), torch.tensor([1.0, 2.0, 3.0, 4.0])
    together = record(empty_history(T), timesteps=timesteps, losses=losses)
    parts = record(empty_history(T), timesteps=timesteps[:2], losses=losses[:2])
    parts = record(parts, timesteps=timesteps[2:], losses=losses[2:])
    assert torch.equal(together.losses, parts.losses)
    assert torch.equal(together.counts, parts.counts)


def test_steps_are_drawn_with_their_probability_and_the_weights_keep_the_mean_loss():
    losses = torch.tensor([4.0, 1.0, 2.0, 0.5, 1.0])
    history = warm(losses)
    uniform = (torch.arange(20_000) + 0.5) / 20_000
    timesteps, weights = draw_timesteps(history, uniform)
    drawn = timesteps.bincount(minlength=T) / 20_000
    torch.testing.assert_close(drawn, probabilities(history).float(), atol=1e-4, rtol=0)
    assert (weights * losses[timesteps]).mean().item() == pytest.approx(losses.mean().item(), rel=1e-3)
    # Without a history the draw is even, and weighs one.
    timesteps, weights = draw_timesteps(empty_history(4), torch.tensor([0.0, 0.24, 0.25, 0.5, 0.75, 1 - 2**-24]))
    assert timesteps.tolist() == [0, 0, 1, 2, 3, 3]
    assert torch.equal(weights, torch.ones(6))
