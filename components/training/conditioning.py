"""Conditions of a batch, and their dropout for classifier-free guidance (Ho & Salimans, 2022)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from components.configuration.conditions import ConditionsConfig, DatasetInfo
from components.training.loop import Batch
from components.training.randomness import sample_uniform

PAD_ID, BOS_ID, EOS_ID = 0, 1, 2  # of every BPE of this house


def conditions_of(batch: Batch, names: Sequence[str]) -> dict[str, Tensor]:
    """The model's conditions: label (B,), text (B, L), condition (B, M), image_embedding (B, E)…"""
    return {name: batch[name] for name in names}


def null_conditions(
    batch: Batch, names: Sequence[str], *, num_classes: int, null_condition: int = 0
) -> dict[str, Tensor]:
    """The null of each condition, in the place of a dropped one.

    The label after the last class, the encoding of an empty text, the token after the last one of condition images, an
    image or embedding of zeros; for outputs of a frozen text encoder (text_states, text_embedding) its output for an
    empty text, a column of the batch.
    """
    empty = {name: batch[f"null_{name}"] for name in names if f"null_{name}" in batch}
    if "label" in names:
        empty["label"] = torch.full_like(batch["label"], num_classes)
    if "text" in names:
        empty["text"] = torch.full_like(batch["text"], PAD_ID)
        empty["text"][:, 0], empty["text"][:, 1] = BOS_ID, EOS_ID
    if "condition_image" in names:
        empty["condition_image"] = torch.zeros_like(batch["condition_image"])
    if "condition" in names:
        empty["condition"] = torch.full_like(batch["condition"], null_condition)
    if "image_embedding" in names:
        empty["image_embedding"] = torch.zeros_like(batch["image_embedding"])
    return empty


def dropped_conditions(
    batch: Batch, conditioning: ConditionsConfig, dataset_info: DatasetInfo, *, seed: int
) -> dict[str, Tensor]:
    """Replace conditions by nulls with probability cond_drop_prob, sample by sample.

    "joint" drops all of a sample's conditions together; "independent" draws for each, as guidance by one of several
    conditions needs. Draws depend on (seed, position) alone.
    """
    full = conditions_of(batch, conditioning.conditions)
    null_condition = dataset_info.condition.codebook_size if dataset_info.condition else 0
    empty = null_conditions(
        batch, conditioning.conditions, num_classes=dataset_info.num_classes, null_condition=null_condition
    )
    mixed = {}
    for name, value in full.items():
        stream = "drop" if conditioning.cond_drop == "joint" else f"drop_{name}"
        drop = sample_uniform(seed, batch["position"], stream=stream, device=value.device) < conditioning.cond_drop_prob
        mixed[name] = torch.where(drop.reshape(-1, *[1] * (value.ndim - 1)), empty[name], value)
    return mixed
