"""Loss-aware sampling of training steps (Nichol and Dhariwal, 2021, equation 18).

The history is plain tensors, so that it can be kept in a checkpoint; every rank must record the same losses in the same
order. Shapes: T num_train_timesteps, K losses kept of each step, B batch.
"""

from typing import NamedTuple

import torch
from torch import Tensor

KEPT = 10  # losses of each step
UNIFORM_SHARE = 0.001  # of the probability, so that no step is ever forgotten


class LossHistory(NamedTuple):
    losses: Tensor  # (T, K) float64, the latest of each step, oldest first
    counts: Tensor  # (T,) int64 in [0, K], how many of them there are


def empty_history(num_train_timesteps: int) -> LossHistory:
    return LossHistory(
        losses=torch.zeros(num_train_timesteps, KEPT, dtype=torch.float64),
        counts=torch.zeros(num_train_timesteps, dtype=torch.int64),
    )


def record(history: LossHistory, *, timesteps: Tensor, losses: Tensor) -> LossHistory:
    """The history with the losses (B,) at timesteps (B,), in their order; what is not finite is left out."""
    kept, counts = history.losses.clone(), history.counts.clone()
    for timestep, loss in zip(timesteps.tolist(), losses.double().cpu(), strict=True):
        if not loss.isfinite():
            continue
        if counts[timestep] == KEPT:
            kept[timestep] = torch.cat([kept[timestep, 1:], loss[None]])
        else:
            kept[timestep, counts[timestep]] = loss
            counts[timestep] += 1
    return LossHistory(kept, counts)


def probabilities(history: LossHistory) -> Tensor:
    """Of each step, (T,) float64: proportional to the root of its mean squared loss, once all steps have K losses."""
    total = len(history.counts)
    even = torch.full((total,), 1 / total, dtype=torch.float64)
    if bool((history.counts < KEPT).any()):
        return even
    moments = history.losses.square().mean(dim=1).sqrt()
    return (1 - UNIFORM_SHARE) * moments / moments.sum() + UNIFORM_SHARE * even


def draw_timesteps(history: LossHistory, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Steps (B,) int64 from numbers (B,) in [0, 1), and the weights (B,) float32 of their losses, 1 / (T p), with which
    their mean is that of an even draw."""
    chances = probabilities(history)
    edges = chances.cumsum(0)
    timesteps = torch.searchsorted(edges, uniform.double().cpu(), right=True).clamp(max=len(chances) - 1)
    weights = 1 / (len(chances) * chances[timesteps])
    return timesteps.to(uniform.device), weights.float().to(uniform.device)
