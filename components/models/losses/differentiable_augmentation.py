"""Differentiable augmentation for GANs: color, translation and cutout of the discriminator's images.

Source: Zhao et al. 2020, "Differentiable Augmentation for Data-Efficient GAN Training". The discriminator sees real and
generated images augmented alike, in all of its losses: so the discriminator cannot learn a small set of images by
heart, and the augmentation does not appear in generated images. As published: color, translation by up to an eighth of
the side, cutout of half the side.

Shapes: B batch, H W pixels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from components.models.transfer import to_device

DRAWS = ("brightness", "saturation", "contrast", "shift_y", "shift_x", "cut_y", "cut_x")  # of each image
SHIFT, CUT = 1 / 8, 1 / 2  # of the side


def augment(image: Tensor, *, draws: Tensor) -> Tensor:
    """Augment images (B, 3, H, W) in [-1, 1] with gradient, each by a row of draws alone.

    Args:
        draws: uniform numbers in [0, 1), (B, 7), in the order of DRAWS, on the host, where the slices are chosen.
    """
    shift_y, shift_x = draws[:, 3], draws[:, 4]
    brightness, saturation, contrast, _, _, cut_y, cut_x = to_device(draws, image.device).unbind(1)
    image = jitter_color(image, brightness=brightness - 0.5, saturation=2 * saturation, contrast=contrast + 0.5)
    height, width = image.shape[2:]
    image = shift(image, down=_shift(shift_y, height), right=_shift(shift_x, width))
    return cut_out(image, top=_cut(cut_y, height), left=_cut(cut_x, width))


def jitter_color(image: Tensor, *, brightness: Tensor, saturation: Tensor, contrast: Tensor) -> Tensor:
    """Add `brightness`, then scale the distance to each pixel's grey and to the image's mean; all (B,)."""
    image = image + brightness[:, None, None, None]
    grey = image.mean(dim=1, keepdim=True)
    image = grey + (image - grey) * saturation[:, None, None, None]
    mean = image.mean(dim=(1, 2, 3), keepdim=True)
    return mean + (image - mean) * contrast[:, None, None, None]


def shift(image: Tensor, *, down: Tensor, right: Tensor) -> Tensor:
    """Move each image by whole pixels (B,) int64 on the host, at most an eighth of the side; fill with 0."""
    height, width = image.shape[2:]
    pad_y, pad_x = _largest(height), _largest(width)
    padded = F.pad(image, (pad_x, pad_x, pad_y, pad_y))
    places = zip(padded.unbind(), (pad_y - down).tolist(), (pad_x - right).tolist(), strict=True)
    return torch.stack([each[:, top : top + height, left : left + width] for each, top, left in places])


def cut_out(image: Tensor, *, top: Tensor, left: Tensor) -> Tensor:
    """Set a rectangle of half the sides to 0 from (top, left), (B,) int64, cut at the image's border."""
    inside = []
    for start, side in ((top, image.shape[2]), (left, image.shape[3])):
        place = torch.arange(side, device=image.device)
        inside.append((place >= start[:, None]) & (place < start[:, None] + int(side * CUT)))
    mask = inside[0][:, None, :, None] & inside[1][:, None, None, :]  # (B, 1, H, W)
    return image.masked_fill(mask, 0)


def _largest(side: int) -> int:
    return int(side * SHIFT + 0.5)


def _shift(draw: Tensor, side: int) -> Tensor:
    """Map a uniform draw in [0, 1) to a uniform whole shift."""
    return (draw * (2 * _largest(side) + 1)).long() - _largest(side)


def _cut(draw: Tensor, side: int) -> Tensor:
    """Map a uniform draw in [0, 1) to the first row of a mask with a uniform center in the image."""
    return (draw * side).long() - int(side * CUT) // 2
