"""Degraded images for image-to-image models, with a mask of the unknown pixels.

Source: Palette (Saharia et al., 2022). A degraded image is an image and a `mask` (B, 1, H, W), 1 where a pixel is
unknown. Tasks that change every pixel (colorization, JPEG restoration, super-resolution) have a mask of ones. The
network sees image and mask, four channels, and no name of a task: the network recognizes the task from the image
(section 4.5, "multi-task Palette").

No random number is drawn here. Images are float (B, 3, H, W) in [-1, 1].
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple, Protocol

import torch
from einops import repeat
from torch import Tensor

from components.models.diffusion.corruption import downsample, quantize_8_bit, upsample
from components.models.diffusion.masks import border_mask, inpainting_mask
from components.models.transfer import to_device

TASKS = ("inpainting", "uncropping", "colorization", "jpeg", "super_resolution")
MASK_TASKS = ("inpainting", "uncropping")  # tasks that leave some pixels unchanged
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, the weights with which image libraries turn color to gray


class Degraded(NamedTuple):
    """Degraded images and masks of the unknown pixels, together the condition of the network."""

    image: Tensor  # (B, 3, H, W); noise in the mask of `MASK_TASKS`
    mask: Tensor  # (B, 1, H, W), 1 is unknown

    @property
    def condition(self) -> Tensor:
        """The network's condition (B, 4, H, W): three channels of the image, then the mask."""
        return torch.cat([self.image, self.mask], dim=1)


class MaskedObjective(Protocol):
    """The two formulas of an objective where a mask counts: the noised image and the loss."""

    def add_noise(self, x_0: Tensor, noise: Tensor, time: Tensor) -> Tensor: ...

    def loss(self, output: Tensor, *, x_0: Tensor, noise: Tensor, x_t: Tensor, time: Tensor) -> Tensor: ...


def degrade(
    image: Tensor,
    compressed: Tensor,
    *,
    tasks: Sequence[str],
    numbers: Tensor,
    noise: Tensor,
    mask_area: tuple[float, float],
    factors: Sequence[int],
) -> Degraded:
    """Degrade each image by the named task; no image depends on another image of the batch.

    Args:
        image: (B, 3, S, S).
        compressed: (B, 3, S, S), each image after JPEG compression; used by the task jpeg alone.
        tasks: B names.
        numbers: (B, NUMBERS) draws in [0, 1) on the host, for the choices that the task leaves open.
        noise: (B, 3, S, S) standard normal, fills masks.
        mask_area: least and greatest share of an image that rectangles and borders hide.
        factors: the factors of super-resolution, among which a draw chooses.
    """
    images, size = [], image.shape[-1]
    drawn = [_mask(task, draws, size, mask_area) for task, draws in zip(tasks, numbers.tolist(), strict=True)]
    masks = to_device(torch.cat(drawn), image.device).to(image.dtype)
    for row, (task, draws) in enumerate(zip(tasks, numbers.tolist(), strict=True)):
        whole = image[row : row + 1]
        match task:
            case "inpainting" | "uncropping":
                left = fill_mask(whole, masks[row : row + 1], noise[row : row + 1])
            case "colorization":
                left = gray(whole)
            case "jpeg":
                left = compressed[row : row + 1]
            case "super_resolution":
                left = blurred(whole, factors[int(draws[0] * len(factors))])
            case _:
                raise ValueError(f"unknown task {task!r}: choose {' or '.join(TASKS)}")
        images.append(left)
    return Degraded(torch.cat(images), masks)


def _mask(task: str, draws: Sequence[float], size: int, area: tuple[float, float]) -> Tensor:  # (1, 1, S, S) bool
    if task == "inpainting":
        return inpainting_mask(draws, size, area=area)[None, None]
    if task == "uncropping":
        return border_mask(draws, size, area=area)[None, None]
    return torch.ones(1, 1, size, size, dtype=torch.bool)


def fill_mask(image: Tensor, mask: Tensor, noise: Tensor) -> Tensor:
    """The known pixels exactly, and noise inside the mask: the condition of Palette, section 3."""
    return torch.where(mask > 0, noise, image)


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


def add_noise_in_mask(objective: MaskedObjective, x_0: Tensor, noise: Tensor, time: Tensor, mask: Tensor) -> Tensor:
    """x_t with noise in the mask only; the network sees the other pixels clean."""
    return torch.where(mask > 0, objective.add_noise(x_0, noise, time), x_0)


def loss_in_mask(
    objective: MaskedObjective, output: Tensor, *, x_0: Tensor, noise: Tensor, x_t: Tensor, time: Tensor, mask: Tensor
) -> Tensor:
    """The objective's loss (B,) averaged over the pixels of the mask; known pixels do not count.

    The error of every target that is linear in x_0, noise and x_t is zero where these three and the output are zero, so
    the mean over all pixels, divided by the mask's share of the pixels, is the mean over the mask. A learned variance
    is not linear, and image-to-image models do not accept a learned variance.
    """
    whole = objective.loss(output * mask, x_0=x_0 * mask, noise=noise * mask, x_t=x_t * mask, time=time)
    return whole / mask.mean(dim=(1, 2, 3))


def denoise_in_mask(
    denoise: Callable[[Tensor, Tensor], Tensor], known: Tensor, mask: Tensor
) -> Callable[[Tensor, Tensor], Tensor]:
    """Wrap `denoise` to restore known pixels before each step: x_t = m x_t + (1 - m) x_0.

    Args:
        known: (B, 3, H, W), read outside of the mask.
    """
    return lambda x_t, time: denoise(torch.where(mask > 0, x_t, known), time)
