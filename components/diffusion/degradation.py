"""What an image-to-image model is given of a picture, and how it fills in the rest (Palette; Saharia et al., 2022).

A degraded picture is a picture and a `hole` (B, 1, H, W), 1 where a pixel is unknown. Tasks that change every pixel
(colorization, JPEG restoration, super-resolution) have a hole of ones. The network sees both, four channels, and no
name of a task: it tells by looking (section 4.5, "multi-task Palette").

No random number is drawn here. Images are float (B, 3, H, W) in [-1, 1].
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from einops import repeat
from torch import Tensor

from components.diffusion.corruption import downsample, quantize_8_bit, upsample
from components.diffusion.holes import border_hole, inpainting_hole

TASKS = ("inpainting", "uncropping", "colorization", "jpeg", "super_resolution")
HOLE_TASKS = ("inpainting", "uncropping")  # those that keep some pixels as they are
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as picture libraries turn color to gray


class Degraded(NamedTuple):
    """What is left of pictures."""

    picture: Tensor  # (B, 3, H, W); noise in the hole of tasks that keep the other pixels
    hole: Tensor  # (B, 1, H, W), 1 is unknown

    @property
    def condition(self) -> Tensor:
        """(B, 4, H, W): what the network is given."""
        return torch.cat([self.picture, self.hole], dim=1)


class HoleObjective(Protocol):
    """The two formulas of an objective that a hole changes."""

    def add_noise(self, x_0: Tensor, noise: Tensor, time: Tensor) -> Tensor: ...

    def loss(self, output: Tensor, *, x_0: Tensor, noise: Tensor, x_t: Tensor, time: Tensor) -> Tensor: ...


def degrade(
    image: Tensor,
    compressed: Tensor,
    *,
    tasks: Sequence[str],
    numbers: Tensor,
    noise: Tensor,
    hole_area: tuple[float, float],
    factors: Sequence[int],
) -> Degraded:
    """Take from each picture what its task takes; no picture depends on another one of the batch.

    Args:
        image: (B, 3, S, S).
        compressed: (B, 3, S, S), what JPEG leaves of each; looked at where the task is jpeg.
        tasks: B names.
        numbers: (B, NUMBERS) draws in [0, 1), what is not given by the task is decided by.
        noise: (B, 3, S, S) standard normal, fills holes.
        hole_area: least and greatest share of a picture that rectangles and borders hide.
        factors: of super-resolution, one is drawn.
    """
    pictures, holes = [], []
    for row, (task, draws) in enumerate(zip(tasks, numbers.tolist(), strict=True)):
        whole, size = image[row : row + 1], image.shape[-1]
        hole = _hole(task, draws, size, hole_area).to(whole)
        match task:
            case "inpainting" | "uncropping":
                picture = fill_hole(whole, hole, noise[row : row + 1])
            case "colorization":
                picture = gray(whole)
            case "jpeg":
                picture = compressed[row : row + 1]
            case "super_resolution":
                picture = blurred(whole, factors[int(draws[0] * len(factors))])
            case _:
                raise ValueError(f"unknown task {task!r}: choose {' or '.join(TASKS)}")
        pictures.append(picture)
        holes.append(hole)
    return Degraded(torch.cat(pictures), torch.cat(holes))


def _hole(task: str, draws: Sequence[float], size: int, area: tuple[float, float]) -> Tensor:  # (1, 1, S, S)
    if task == "inpainting":
        return inpainting_hole(draws, size, area=area)[None, None]
    if task == "uncropping":
        return border_hole(draws, size, area=area)[None, None]
    return torch.ones(1, 1, size, size)


def fill_hole(picture: Tensor, hole: Tensor, noise: Tensor) -> Tensor:
    """The known pixels exactly, and noise where there is the hole: the condition of Palette, section 3."""
    return torch.where(hole > 0, noise, picture)


def gray(image: Tensor) -> Tensor:
    """The luma in three equal channels, of 8 bits as a gray picture on disk."""
    weights = torch.tensor(LUMA, device=image.device, dtype=image.dtype).reshape(1, 3, 1, 1)
    return repeat(quantize_8_bit((image * weights).sum(dim=1, keepdim=True)), "b 1 h w -> b 3 h w").contiguous()


def blurred(image: Tensor, factor: int) -> Tensor:
    """Shrunk by a factor to 8 bits, and enlarged again: what super-resolution starts from."""
    size = image.shape[-1]
    return upsample(quantize_8_bit(downsample(image, size // factor)), size)


def add_noise_in_hole(objective: HoleObjective, x_0: Tensor, noise: Tensor, time: Tensor, hole: Tensor) -> Tensor:
    """x_t that is noisy in the hole only; the network sees the other pixels as they are."""
    return torch.where(hole > 0, objective.add_noise(x_0, noise, time), x_0)


def loss_in_hole(
    objective: HoleObjective, output: Tensor, *, x_0: Tensor, noise: Tensor, x_t: Tensor, time: Tensor, hole: Tensor
) -> Tensor:
    """The objective's loss (B,) as a mean over the pixels of the hole; the others have no part in it.

    The error of every target that is linear in x_0, noise and x_t is zero where all of them and the output are, so the
    mean over all pixels, times what the hole's share lacks of 1, is the mean over the hole. A learned variance is not
    linear, and is not taken by image-to-image models.
    """
    whole = objective.loss(output * hole, x_0=x_0 * hole, noise=noise * hole, x_t=x_t * hole, time=time)
    return whole / hole.mean(dim=(1, 2, 3))


def denoise_in_hole(
    denoise: Callable[[Tensor, Tensor], Tensor], known: Tensor, hole: Tensor
) -> Callable[[Tensor, Tensor], Tensor]:
    """The network of a sampler that puts the known pixels back before each step: x_t = m x_t + (1 - m) x_0.

    Args:
        known: (B, 3, H, W), looked at outside of the hole.
    """
    return lambda x_t, time: denoise(torch.where(hole > 0, x_t, known), time)
