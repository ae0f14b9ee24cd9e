"""Conditions of a batch, and their dropout for classifier-free guidance (Ho & Salimans, 2022)."""

import torch
from torch import Tensor

from components.training.config import (
    Condition,
    Conditions,
    DiffusionConfig,
    PixelConfig,
    TokenCondition,
    TokenNetworkConfig,
)
from components.training.loop import Batch
from components.training.randomness import sample_uniform

PAD_ID, BOS_ID, EOS_ID = 0, 1, 2  # of every BPE of this house


def conditions_of(batch: Batch, names: tuple[Condition | TokenCondition, ...]) -> dict[str, Tensor]:
    """The conditions that the model takes: label (B,), text (B, L), condition (B, M)."""
    return {name: batch[name] for name in names}


def null_conditions(
    batch: Batch, names: tuple[Condition | TokenCondition, ...], *, num_classes: int, null_condition: int = 0
) -> dict[str, Tensor]:
    """ "Nothing in particular" for each sample: the label after the last class, the encoding of an empty text, the
    token after the last one of condition pictures."""
    empty = {}
    if "label" in names:
        empty["label"] = torch.full_like(batch["label"], num_classes)
    if "text" in names:
        empty["text"] = torch.full_like(batch["text"], PAD_ID)
        empty["text"][:, 0], empty["text"][:, 1] = BOS_ID, EOS_ID
    if "condition" in names:
        empty["condition"] = torch.full_like(batch["condition"], null_condition)
    return empty


def dropped_conditions(
    batch: Batch, config: TokenNetworkConfig | PixelConfig | DiffusionConfig, offers: Conditions
) -> dict[str, Tensor]:
    """Replace conditions by their null with probability cond_drop_prob, sample by sample.

    "joint" drops all of a sample's conditions together; "independent" draws for each, which guidance by one of several
    conditions needs. What is drawn depends on (seed, position) alone.
    """
    full = conditions_of(batch, config.conditions)
    null_condition = offers.condition.codebook_size if offers.condition else 0
    empty = null_conditions(batch, config.conditions, num_classes=offers.num_classes, null_condition=null_condition)
    mixed = {}
    for name, value in full.items():
        stream = "drop" if config.cond_drop == "joint" else f"drop_{name}"
        drop = sample_uniform(config.seed, batch["position"], stream=stream) < config.cond_drop_prob
        mixed[name] = torch.where(drop.reshape(-1, *[1] * (value.ndim - 1)), empty[name], value)
    return mixed
