"""AdamW with weight decay where it belongs, a warmed-up and decaying learning rate, clipping."""

import math

import torch
from torch import Tensor, nn

from components.training.config import TrainingConfig


def make_optimizer(network: nn.Module, config: TrainingConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter, 2019) that decays matrices and kernels, not biases, norms and scalars."""
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=True)


def learning_rate(config: TrainingConfig, step: int) -> float:
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
