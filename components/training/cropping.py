"""Training on windows of pictures, for the top stages of a cascade (patch training).

A network without attention looks at the surroundings of a pixel, not at all of the picture: it learns from windows, for
a fraction of the memory, and samples whole pictures. Shapes: B batch, S resolution, W window size.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from components.training.loop import Batch
from components.training.randomness import sample_integers

PICTURES = ("image", "low_res", "condition_image")


class Windows(NamedTuple):
    """A square window of each picture."""

    top: Tensor  # (B,) int64
    left: Tensor  # (B,) int64
    size: int  # W

    def cut(self, image: Tensor) -> Tensor:  # (B, C, S, S) -> (B, C, W, W)
        corners = zip(image, self.top.tolist(), self.left.tolist(), strict=True)
        return torch.stack([picture[:, y : y + self.size, x : x + self.size] for picture, y, x in corners])


def draw_windows(seed: int, position: Tensor, *, resolution: int, size: int) -> Windows:
    """Each place of the window inside the picture alike, by (seed, position)."""
    places = resolution - size + 1
    top, left = (sample_integers(seed, position, stream=f"window_{name}", high=places) for name in ("top", "left"))
    return Windows(top, left, size)


def cropped(tensors: Batch, windows: Windows) -> Batch:
    """The same window of x_0 and of every picture among the conditions; what is no picture stays."""
    return {name: windows.cut(value) if name in PICTURES else value for name, value in tensors.items()}
