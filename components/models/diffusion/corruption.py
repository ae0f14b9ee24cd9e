"""Images with less in them: fewer pixels, noise (cascades; Ho et al., 2022), 256 levels, gray.
Images are float (B, C, H, W) in [-1, 1]."""

from functools import cache

import torch
import torch.nn.functional as F
from einops import repeat
from torch import Tensor

from components.models.devices import to_device
from components.models.diffusion.schedule import Schedule

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, the weights with which image libraries turn color to gray


def downsample(image: Tensor, size: int) -> Tensor:
    """Shrink to (B, C, size, size) by area averaging, free of aliasing in contrast to plain bilinear."""
    return F.interpolate(image, size=(size, size), mode="area")


def upsample(image: Tensor, size: int) -> Tensor:
    """Enlarge to (B, C, size, size) by bilinear interpolation."""
    return F.interpolate(image, size=(size, size), mode="bilinear", align_corners=False)


def augment_low_res(schedule: Schedule, low_res: Tensor, noise: Tensor, noise_level: Tensor) -> Tensor:
    """Noise conditioning augmentation (Ho et al., 2022, 4.2): low_res after noise_level noising steps.

    Args:
        low_res, noise: (B, C, H, W), low_res already enlarged to the size of x_t.
        noise_level: (B,) int64 in [0, T), a level for each sample, counted in noising steps: 0 leaves the image
            unchanged, and a higher level hides more of the image.
    """
    # At index n, `signal_before` is the factor of the signal after n steps.
    signal, sigma = (schedule.at(name, noise_level, low_res) for name in ("signal_before", "sigma_before"))
    return signal * low_res + sigma * noise


def quantize_8_bit(image: Tensor) -> Tensor:
    """Round to the 256 values of a stored image, the precision of the upsampler's training images."""
    return from_levels(to_levels(image).round().clamp(0, 255))


def to_levels(image: Tensor) -> Tensor:
    """[-1, 1] -> [0, 255], any shape, not rounded: an image of 8 bits gives near whole numbers."""
    return (image + 1) * 127.5


def from_levels(levels: Tensor) -> Tensor:
    """[0, 255] -> [-1, 1], any shape; float32 for integers."""
    return levels / 127.5 - 1


@cache
def _luma(device: torch.device) -> Tensor:  # (1, 3, 1, 1) float64, sent there once
    with torch.inference_mode(mode=False):
        return to_device(torch.tensor(LUMA, dtype=torch.float64).reshape(1, 3, 1, 1), device)


def gray(image: Tensor) -> Tensor:
    """The luma in three equal channels, rounded to 8 bits like a gray image on disk."""
    weights = _luma(image.device).to(image.dtype)
    return repeat(quantize_8_bit((image * weights).sum(dim=1, keepdim=True)), "b 1 h w -> b 3 h w").contiguous()


def blurred(image: Tensor, factor: int) -> Tensor:
    """Shrink by a factor to 8 bits and enlarge again: the input of super-resolution."""
    size = image.shape[-1]
    return upsample(quantize_8_bit(downsample(image, size // factor)), size)
