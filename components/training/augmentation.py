"""Random changes of a batch by position in the stream: shifts, mirroring, windows, conditions dropped.

Conditions are dropped for classifier-free guidance (Ho & Salimans, 2022). Windows are for networks without attention:
these look at the surroundings of a pixel, not at the whole image, so they learn from windows, for a fraction of the
memory, and sample whole images (the top stages of a cascade).

Shapes: B batch, H W pixels, S resolution, W window size."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from components.configuration.conditions import ConditionsConfig, DatasetInfo
from components.training.loop import Batch
from components.training.randomness import sample_integers, sample_uniform

IMAGES = ("image", "low_res", "condition_image")
PAD_ID, BOS_ID, EOS_ID = 0, 1, 2  # of every BPE of this house


def shifted(image: Tensor, position: Tensor, *, seed: int, max_shift: int) -> Tensor:
    """Shifts each of (B, 3, H, W) by up to max_shift pixels each way, with edges repeated."""
    if max_shift == 0:
        return image
    draws = {"high": 2 * max_shift + 1, "device": image.device}
    top, left = (sample_integers(seed, position, stream=f"shift_{axis}", **draws) for axis in ("y", "x"))
    padded = F.pad(image, [max_shift] * 4, mode="replicate")
    rows = top[:, None] + torch.arange(image.shape[2], device=image.device)  # (B, H)
    columns = left[:, None] + torch.arange(image.shape[3], device=image.device)  # (B, W)
    sample = torch.arange(len(image), device=image.device)[:, None, None]
    moved = padded.permute(0, 2, 3, 1)[sample, rows[:, :, None], columns[:, None, :]]  # (B, H, W, 3)
    return moved.permute(0, 3, 1, 2)


def mirrored(image: Tensor, position: Tensor, *, seed: int) -> Tensor:
    """Exchanges left and right of half of (B, 3, H, W), drawn at random."""
    mirror = sample_integers(seed, position, stream="mirror", high=2, device=image.device) == 1
    return torch.where(mirror[:, None, None, None], image.flip(3), image)


class Windows(NamedTuple):
    """A square window of each image, with its place on the host, for cuts without a wait."""

    top: Tensor  # (B,) int64
    left: Tensor  # (B,) int64
    size: int  # W

    def cut(self, image: Tensor) -> Tensor:
        """Cuts (B, C, S, S) to (B, C, W, W)."""
        corners = zip(image, self.top.tolist(), self.left.tolist(), strict=True)
        return torch.stack([each[:, y : y + self.size, x : x + self.size] for each, y, x in corners])


def draw_windows(seed: int, position: Tensor, *, resolution: int, size: int) -> Windows:
    """Draws a window inside each image, uniformly, by (seed, position)."""
    places = resolution - size + 1
    top, left = (sample_integers(seed, position, stream=f"window_{name}", high=places) for name in ("top", "left"))
    return Windows(top, left, size)


def cropped(tensors: Batch, windows: Windows) -> Batch:
    """Cuts the same window of every image of a batch, conditions included; other columns stay."""
    return {name: windows.cut(value) if name in IMAGES else value for name, value in tensors.items()}


def null_conditions(
    batch: Batch, names: Sequence[str], *, num_classes: int, null_condition: int = 0
) -> dict[str, Tensor]:
    """The null of each condition, in the place of a dropped one.
    The label after the last class, the encoding of an empty text, the token after the last one of condition images, an
    image or embedding of zeros; for outputs of a frozen text encoder (text_states, text_embedding) its output for an
    empty text, a column of the batch."""
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
    conditions needs. Draws depend on (seed, position) alone."""
    null_condition = dataset_info.condition.codebook_size if dataset_info.condition else 0
    empty = null_conditions(
        batch, conditioning.conditions, num_classes=dataset_info.num_classes, null_condition=null_condition
    )
    mixed = {}
    for name in conditioning.conditions:
        value = batch[name]
        stream = "drop" if conditioning.cond_drop == "joint" else f"drop_{name}"
        drop = sample_uniform(seed, batch["position"], stream=stream, device=value.device) < conditioning.cond_drop_prob
        mixed[name] = torch.where(drop.reshape(-1, *[1] * (value.ndim - 1)), empty[name], value)
    return mixed
