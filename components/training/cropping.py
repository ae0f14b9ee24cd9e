"""Training on windows of images, for the top stages of a cascade (patch training).

A network without attention looks at the surroundings of a pixel, not at all of the image: it learns from windows, for
a fraction of the memory, and samples whole images. Shapes: B batch, S resolution, W window size.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from components.training.loop import Batch
from components.training.randomness import sample_integers

IMAGES = ("image", "low_res", "condition_image")


class Windows(NamedTuple):
    """A square window of each image."""

    top: Tensor  # (B,) int64
    left: Tensor  # (B,) int64
    size: int  # W

    def cut(self, image: Tensor) -> Tensor:  # (B, C, S, S) -> (B, C, W, W)
        corners = zip(image, self.top.tolist(), self.left.tolist(), strict=True)
        return torch.stack([each[:, y : y + self.size, x : x + self.size] for each, y, x in corners])


def draw_windows(seed: int, position: Tensor, *, resolution: int, size: int) -> Windows:
    """Each place of the window inside the image alike, by (seed, position)."""
    places = resolution - size + 1
    top, left = (sample_integers(seed, position, stream=f"window_{name}", high=places) for name in ("top", "left"))
    return Windows(top, left, size)


def cropped(tensors: Batch, windows: Windows) -> Batch:
    """The same window of x_0 and of every image among the conditions; what is no image stays."""
    return {name: windows.cut(value) if name in IMAGES else value for name, value in tensors.items()}
