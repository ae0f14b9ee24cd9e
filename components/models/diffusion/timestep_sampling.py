"""Loss-aware sampling of training steps (Nichol and Dhariwal, 2021, equation 18).
The history is plain tensors, so that a checkpoint can hold the history; every rank must record the same losses in the
same order. Shapes: T num_train_timesteps, K losses kept of each step, B batch."""

from typing import NamedTuple

import torch
from torch import Tensor

KEPT = 10  # losses of each step
UNIFORM_SHARE = 0.001  # of the probability, so that no step is ever forgotten


class LossHistory(NamedTuple):
    """The latest losses of each training step, recorded by `record` and read by `probabilities`."""

    losses: Tensor  # (T, K) float64, the latest of each step, oldest first
    counts: Tensor  # (T,) int64 in [0, K], how many losses are recorded


def empty_history(num_train_timesteps: int, device: torch.device | str = "cpu") -> LossHistory:
    return LossHistory(
        losses=torch.zeros(num_train_timesteps, KEPT, dtype=torch.float64, device=device),
        counts=torch.zeros(num_train_timesteps, dtype=torch.int64, device=device),
    )


def record(history: LossHistory, *, timesteps: Tensor, losses: Tensor) -> LossHistory:
    """The history with the losses (B,) at timesteps (B,) appended in order; infinite and NaN left out.
    All on the device of the history; of each step the last K stay."""
    total, counts = len(history.counts), history.counts
    finite = losses.isfinite()
    new = torch.zeros_like(counts).index_add_(0, timesteps, finite.long())  # (T,)
    left_out = (counts + new - KEPT).clamp(min=0)  # (T,) of the oldest
    place = torch.arange(KEPT, device=counts.device) + left_out[:, None]  # (T, K), the former place of each loss
    kept = torch.where(place < counts[:, None], history.losses.gather(1, place.clamp(max=KEPT - 1)), 0.0)
    same = (timesteps[:, None] == timesteps) & finite  # (B, B)
    earlier = same.tril(-1).sum(dim=1)  # (B,), finite losses of the same step before each loss
    column = counts[timesteps] + earlier - left_out[timesteps]  # (B,)
    spare = total * KEPT  # the place of losses that are left out
    target = torch.where(finite & (column >= 0), timesteps * KEPT + column, spare)
    flat = torch.cat([kept.flatten(), kept.new_zeros(1)]).scatter(0, target, losses.double())
    return LossHistory(flat[:spare].view(total, KEPT), (counts + new).clamp(max=KEPT))


def probabilities(history: LossHistory) -> Tensor:
    """Probability of each step, (T,) float64: proportional to the root mean square of the step's losses.
    Even until all steps have K losses."""
    total = len(history.counts)
    even = torch.full((total,), 1 / total, dtype=torch.float64, device=history.counts.device)
    moments = history.losses.square().mean(dim=1).sqrt()
    uneven = (1 - UNIFORM_SHARE) * moments / moments.sum() + UNIFORM_SHARE * even
    return torch.where((history.counts < KEPT).any(), even, uneven)


def draw_timesteps(history: LossHistory, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Steps (B,) int64 from numbers (B,) in [0, 1), and the weights (B,) float32 of the losses.
    The weights 1 / (T p) make the mean of the weighted losses an unbiased estimate of the mean over even draws. All
    tensors are on the same device."""
    chances = probabilities(history)
    edges = chances.cumsum(0)
    timesteps = torch.searchsorted(edges, uniform.double(), right=True).clamp(max=len(chances) - 1)
    weights = 1 / (len(chances) * chances[timesteps])
    return timesteps, weights.float()
