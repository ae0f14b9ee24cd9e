"""Conversion between 8-bit images and tensors in [-1, 1], with gray images and codes.

Gray images have one channel; codes are shown as colors. Nothing else in the house converts pixels.

Shapes: B images, H W their pixels, S = resolution, h w a latent grid, K codes, C their components.
"""

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from components.models.autoencoder import Autoencoder
from components.models.diffusion.corruption import from_levels, to_levels
from components.sampling.image_files import WHITE, open_given_image, to_mask, to_rgb


def from_uint8(pixels: np.ndarray | Tensor) -> Tensor:
    """uint8 (…, H, W, 3) -> float32 (…, 3, H, W) in [-1, 1], channels last in memory."""
    return from_levels(rearrange(torch.as_tensor(pixels), "... h w c -> ... c h w").float())


def to_uint8(images: Tensor) -> np.ndarray:
    """(B, 3 or 1, H, W) in [-1, 1], of any float type and device -> uint8 (B, H, W, 3), rounded."""
    return to_bytes(images).cpu().numpy()


def to_bytes(images: Tensor) -> Tensor:
    """Converts like `to_uint8`, but stays on the device of the images and does not wait."""
    return _levels_to_bytes(to_levels(images.float()))


def levels_to_uint8(levels: Tensor) -> np.ndarray:
    """(B, 3 or 1, H, W) in [0, 255] -> uint8 (B, H, W, 3), rounded and clipped."""
    return _levels_to_bytes(levels).cpu().numpy()


def _levels_to_bytes(levels: Tensor) -> Tensor:
    rounded = levels.round().clamp(0, 255).to(torch.uint8)
    colors = rounded.expand(-1, 3, -1, -1) if rounded.shape[1] == 1 else rounded
    return rearrange(colors, "b c h w -> b h w c").contiguous()


def read_image(data: bytes, *, resolution: int) -> Tensor:
    """Decodes an image file to (3, S, S) in [-1, 1]. Raises ValueError for data that is no image."""
    return fitted_image(open_given_image(data, to_rgb), height=resolution, width=resolution)


def fitted_image(image: Image.Image, *, height: int, width: int, nearest: bool = False) -> Tensor:
    """Returns an RGB image as (3, H, W) in [-1, 1], area-averaged to the size, or with the nearest pixels."""
    how = Image.Resampling.NEAREST if nearest else Image.Resampling.BOX
    return from_uint8(np.array(image.resize((width, height), how)))


def read_mask(data: bytes, size: tuple[int, int]) -> Tensor:
    """Decodes a mask file to (1, height, width), 1 where the mask, as of `to_mask`, is white.
    Raises ValueError for another size, or for a mask with nothing white."""
    mask = open_given_image(data, to_mask)
    if mask.size != size:
        raise ValueError(f"the mask has {mask.width}x{mask.height} pixels, the image {size[0]}x{size[1]}")
    unknown = torch.from_numpy(np.array(mask) >= WHITE).float()[None]
    if not unknown.any():
        raise ValueError("the mask has no white pixel: there is nothing to make")
    return unknown


class ColorError(ValueError):
    """An image in color for a model of one channel."""


def one_channel(images: Tensor) -> Tensor:
    """Returns the common channel (B, 1, H, W) of gray images (B, 3, H, W).
    Raises ColorError, which names the first pixel whose channels differ."""
    differs = (images != images[:, :1]).any(dim=1)  # (B, H, W)
    if images.is_meta or not differs.any():  # without numbers there is nothing to check
        return images[:, :1].contiguous()
    image, row, column = differs.nonzero()[0].tolist()
    color = ", ".join(map(str, to_uint8(images[image, :, row, column].reshape(1, 3, 1, 1)).flatten().tolist()))
    raise ColorError(
        f"image {image} of a batch has the color ({color}) in row {row}, column {column}, and a model of one channel "
        "learns gray images alone: set in_channels=3"
    )


@torch.inference_mode()
def index_grids(network: Autoencoder, images: np.ndarray) -> Tensor:
    """Shows the codes of images (B, H, W, 3) uint8 as colors: (B, 3, h, w) in [-1, 1].
    Raises ValueError for a network without codes."""
    device = next(network.parameters()).device
    indices = network.tokenize(from_uint8(images).to(device))  # (B, h, w)
    every = torch.arange(network.codebook_size, device=device)
    codes = network.lookup(every[:, None, None])[:, :, 0, 0]  # (K, C)
    return rearrange(code_colors(codes)[indices], "n h w c -> n c h w")


def code_colors(codes: Tensor) -> Tensor:
    """A color in [-1, 1] for each code, (K, C) -> (K, 3): near codes look alike.
    Red, green and blue are the first three principal components of the codes, each by its rank, so that a far code does
    not make all others alike. Where codes have fewer than three components, the other colors stay in the middle. Equal
    codes have one color, and count once: a product of equal rows may differ in its last bit."""
    distinct, number = codes.double().unique(dim=0, return_inverse=True)  # sorted: the order of codes does not show
    centered = distinct - distinct.mean(dim=0)
    _, lengths, directions = torch.linalg.svd(centered, full_matrices=False)
    directions = directions * directions.gather(1, directions.abs().argmax(dim=1, keepdim=True)).sign()  # SVD has none
    colors = torch.zeros(len(distinct), 3, dtype=torch.float64, device=codes.device)
    for channel, direction in enumerate(directions[: min(3, int((lengths > 1e-6 * lengths[:1]).sum()))]):
        place = (centered @ direction).unique(return_inverse=True)[1].double()
        colors[:, channel] = 2 * place / place.max().clamp(min=1) - 1
    return colors.float()[number]
