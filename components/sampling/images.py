"""8-bit images <-> images in [-1, 1], here alone.

Shapes: B images, H W their pixels, S = resolution.
"""

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from components.models.diffusion.corruption import from_levels, to_levels
from components.sampling.image_files import WHITE, open_given_image


def from_uint8(pixels: np.ndarray | Tensor) -> Tensor:
    """uint8 (B, H, W, 3) or (H, W, 3) -> float32 (B, 3, H, W) or (3, H, W) in [-1, 1], channels last in memory."""
    return from_levels(rearrange(torch.as_tensor(pixels), "... h w c -> ... c h w").float())


def to_uint8(images: Tensor) -> np.ndarray:
    """(B, 3, H, W) in [-1, 1], of any float type and on any device -> uint8 (B, H, W, 3), rounded; or (B, 1, H, W), a
    gray channel, which all three become."""
    return to_bytes(images).cpu().numpy()


def to_bytes(images: Tensor) -> Tensor:
    """As `to_uint8`, on the device of the images, and without waiting for it."""
    return _levels_to_bytes(to_levels(images.float()))


def levels_to_uint8(levels: Tensor) -> np.ndarray:
    """(B, 3 or 1, H, W) in [0, 255] -> uint8 (B, H, W, 3), rounded; what lies beyond goes to the nearer end."""
    return _levels_to_bytes(levels).cpu().numpy()


def _levels_to_bytes(levels: Tensor) -> Tensor:
    rounded = levels.round().clamp(0, 255).to(torch.uint8)
    colors = rounded.expand(-1, 3, -1, -1) if rounded.shape[1] == 1 else rounded
    return rearrange(colors, "b c h w -> b h w c").contiguous()


def read_image(data: bytes, *, resolution: int) -> Tensor:
    """An image file as (3, S, S) in [-1, 1]; other sizes are area-averaged. Raises ValueError if it is none."""
    return fitted_image(open_given_image(data), resolution=resolution)


def fitted_image(image: Image.Image, *, resolution: int) -> Tensor:
    """Returns an RGB image as (3, S, S) in [-1, 1], area-averaged to the resolution."""
    return from_uint8(np.array(image.resize((resolution, resolution), Image.Resampling.BOX)))


def read_mask(data: bytes, size: tuple[int, int]) -> Tensor:
    """A mask file as (1, height, width), 1 where it is white. Raises ValueError for another size, or nothing white."""
    mask = open_given_image(data, mode="L")
    if mask.size != size:
        raise ValueError(f"the mask has {mask.width}x{mask.height} pixels, the image {size[0]}x{size[1]}")
    unknown = torch.from_numpy(np.array(mask) >= WHITE).float()[None]
    if not unknown.any():
        raise ValueError("the mask has no white pixel: there is nothing to make")
    return unknown
