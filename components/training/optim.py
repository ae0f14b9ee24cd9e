"""How weights move: AdamW with a warmed-up and decaying rate, weights of losses that change with the step, the average
of the weights, and what happens when a loss or gradient is not finite.
"""

import math
from copy import deepcopy
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from components.configuration.optimization import OptimizationConfig
from components.configuration.trainings import AutoencoderLosses

PATIENCE = 5  # consecutive steps
Network = TypeVar("Network", bound=nn.Module)


def make_optimizer(network: nn.Module, config: OptimizationConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter, 2019) that decays matrices and kernels, not biases, norms and scalars."""
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=True)


def learning_rate(config: OptimizationConfig, step: int) -> float:
    """The rate of step `step` (1-based): linear warm-up to the peak, then decay to final_lr_fraction of it."""
    if step <= config.warmup_steps:
        return config.learning_rate * step / config.warmup_steps
    progress = (step - config.warmup_steps) / (config.total_steps - config.warmup_steps)  # (0, 1]
    left = 1 - progress if config.lr_decay == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return config.learning_rate * (config.final_lr_fraction + (1 - config.final_lr_fraction) * left)


def clip_gradients(network: nn.Module, *, max_norm: float) -> Tensor:
    """Scale all gradients so that their joint norm is at most `max_norm`. Returns the norm before, a scalar."""
    gradients = [parameter for parameter in network.parameters() if parameter.grad is not None]
    return nn.utils.clip_grad_norm_(gradients, max_norm)


def kl_weight_at(losses: AutoencoderLosses, step: int) -> float:
    """Weight of the KL divergence in step `step` (1-based): 0 to kl_weight (Ramesh et al., 2021, appendix A.2)."""
    return along_cosine(0.0, losses.kl_weight, step=step, num_steps=losses.kl_warmup_steps)


def temperature_at(losses: AutoencoderLosses, step: int) -> float:
    """Temperature of the relaxation in step `step` (1-based): 1 to final_temperature (the same appendix)."""
    return along_cosine(1.0, losses.final_temperature, step=step, num_steps=losses.temperature_steps)


def along_cosine(start: float, end: float, *, step: int, num_steps: int) -> float:
    """From `start` at step 0 to `end` at step `num_steps`, half a cosine, and `end` from then on."""
    if step >= num_steps:
        return end
    return end + (start - end) * (1 + math.cos(math.pi * step / num_steps)) / 2


class EMA(Generic[Network]):
    """The average of a network's weights: what is sampled from, and what a bundle holds.

    After update n the decay is min(decay, (1 + n) / (10 + n)): without that warm-up a short run's average is mostly the
    random initialization (improved-diffusion issue 59). Buffers are copied. The average is a network of its own, in
    evaluation mode.
    """

    def __init__(self, network: Network, *, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.network = deepcopy(network).float().eval().requires_grad_(False)

    @property
    def averages(self) -> dict[str, Network]:
        """By the name that checkpoints know it by."""
        return {"ema": self.network}

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        """Move the average towards `network`; call after an optimizer step that was taken."""
        self.updates += 1
        weight = 1 - decay_at(self.updates, decay=self.decay)
        masters = [parameter.float() for parameter in network.parameters()]
        averages: list[Tensor] = [*self.network.parameters()]
        torch._foreach_lerp_(averages, masters, weight)
        for average, buffer in zip(self.network.buffers(), network.buffers(), strict=True):
            average.copy_(buffer)


def decay_at(update: int, *, decay: float) -> float:
    """The decay of update `update` (1-based)."""
    return min(decay, (1 + update) / (10 + update))


class NonFiniteError(RuntimeError):
    """Training or its weights left the finite numbers; the message says what to try."""


class NonFiniteGuard:
    """Counts consecutive non-finite steps. All ranks see the same averaged gradient norm, so all decide the same."""

    def __init__(self) -> None:
        self.consecutive = 0

    def admits(self, norm: Tensor, *, step: int) -> bool:
        """Whether the update of `step` may be taken. Raises NonFiniteError after PATIENCE refusals in a row.

        Reading `norm` waits for the device once a step: the price of never applying a bad update.
        """
        if bool(norm.isfinite()):
            self.consecutive = 0
            return True
        self.consecutive += 1
        if self.consecutive >= PATIENCE:
            raise NonFiniteError(
                f"loss or gradient was not finite for {PATIENCE} steps in a row, the last being {step}; try a lower "
                "learning_rate, a longer warmup_steps, a smaller max_grad_norm or precision: fp32 "
                "(the last good checkpoint is kept)"
            )
        return False
