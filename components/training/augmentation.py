"""Random shifts, mirroring and windows of images, drawn by their positions in the stream.

A network without attention looks at the surroundings of a pixel, not at the whole image: it learns from windows, for a
fraction of the memory, and samples whole images (the top stages of a cascade).

Shapes: B batch, H W pixels, S resolution, W window size.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from components.training.loop import Batch
from components.training.randomness import sample_integers

IMAGES = ("image", "low_res", "condition_image")


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
