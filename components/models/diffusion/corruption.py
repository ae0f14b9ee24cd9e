"""Images with less in them: fewer pixels, noise (cascades; Ho et al., 2022), 256 levels, gray, masks.

Image-to-image models: Palette (Saharia et al., 2022). A degraded image is an image and a `mask` (B, 1, H, W), 1 where a
pixel is unknown (GLIDE's mask is the opposite): brush strokes, rectangles or borders. Tasks that change every pixel
(colorization, JPEG restoration, super-resolution) have a mask of ones. The network sees image and mask, four channels,
and no name of a task: the network recognizes the task from the image (section 4.5, "multi-task Palette"). No random
number is drawn here. Images are float (B, C, H, W) in [-1, 1], of S = H = W pixels where they are degraded."""

import math
from collections.abc import Callable, Sequence
from functools import cache
from statistics import NormalDist
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import repeat
from torch import Tensor

from components.models.devices import to_device
from components.models.diffusion.objective import Objective
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

    `low_res` and `noise` are (B, C, H, W), low_res already enlarged to the size of x_t; `noise_level` (B,) int64 in [0,
    T) counts noising steps: 0 leaves the image unchanged."""
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


NUMBERS = 96  # the most that any mask uses
RECTANGLES = 0.5  # share of rectangles among the masks of inpainting; the rest are strokes
# Strokes of Yu et al. (2019), algorithm 1, with the sizes of their published code, for images of 256².
MAX_STROKES, VERTICES = 3, (4, 12)
WIDTHS = (12 / 256, 40 / 256)
ANGLE, ANGLE_RANGE = 2 * math.pi / 5, 2 * math.pi / 15
LENGTH = math.sqrt(2) / 8
SMALLEST_RADIUS = 0.75  # pixels; a disk of this size holds the center of a pixel at every place


def inpainting_mask(numbers: Sequence[float], resolution: int, *, area: tuple[float, float]) -> Tensor:
    """Return a rectangle or brush strokes somewhere in the image, (S, S) bool, never empty.
    `numbers` are NUMBERS draws in [0, 1), `area` the least and greatest share of the image that a rectangle hides;
    strokes have their own sizes, from Yu et al."""
    rest = numbers[1:]
    return rectangle(rest, resolution, area=area) if numbers[0] < RECTANGLES else strokes(rest, resolution)


def rectangle(numbers: Sequence[float], resolution: int, *, area: tuple[float, float]) -> Tensor:
    """Return a rectangle of a share of the image, half to twice as high as wide: (S, S) bool."""
    share, aspect, down, across = numbers[:4]
    side, stretch = math.sqrt(between(area, share)), 2 ** (aspect - 0.5)
    height, width = (min(max(1, round(side * by * resolution)), resolution - 1) for by in (stretch, 1 / stretch))
    top, left = int(down * (resolution - height + 1)), int(across * (resolution - width + 1))
    mask = torch.zeros(resolution, resolution, dtype=torch.bool)
    mask[top : top + height, left : left + width] = True
    return mask


def border_mask(numbers: Sequence[float], resolution: int, *, area: tuple[float, float]) -> Tensor:
    """The mask of uncropping: a border of equal width at up to four sides, (S, S) bool.
    The width w solves (1 - n w)(1 - m w) = 1 - a for a hidden share a, between the two of `area`, and n, m sides of the
    two directions."""
    share, count = between(area, numbers[0]), 1 + int(4 * numbers[1])
    sides = sorted(range(4), key=lambda side: numbers[2 + side])[:count]  # of top, bottom, left, right
    across = sum(side < 2 for side in sides)
    n, m = across, count - across
    width = share / count if n * m == 0 else (count - math.sqrt(count**2 - 4 * n * m * share)) / (2 * n * m)
    pixels = min(max(1, round(width * resolution)), (resolution - 1) // max(n, m))
    top, bottom, left, right = (pixels if side in sides else 0 for side in range(4))
    mask = torch.ones(resolution, resolution, dtype=torch.bool)
    mask[top : resolution - bottom, left : resolution - right] = False
    return mask


def strokes(numbers: Sequence[float], resolution: int) -> Tensor:
    """Up to three brush strokes of joined straight lines, (S, S) bool (Yu et al., 2019, algorithm 1)."""
    draw = iter(numbers)
    mask = torch.zeros(resolution, resolution, dtype=torch.bool)
    for _ in range(1 + int(MAX_STROKES * next(draw))):
        radius = max(between(WIDTHS, next(draw)) * resolution / 2, SMALLEST_RADIUS)
        points = [(next(draw), next(draw))]
        for line in range(int(between((VERTICES[0], VERTICES[1] + 1), next(draw)))):
            angle = (-1) ** line * (ANGLE + ANGLE_RANGE * (2 * next(draw) - 1))
            drawn = NormalDist(LENGTH, LENGTH / 2).inv_cdf(max(next(draw), 1e-9))
            length = min(max(0.0, drawn), 2 * LENGTH)
            x, y = points[-1][0] + length * math.cos(angle), points[-1][1] + length * math.sin(angle)
            points.append((min(max(x, 0.0), 1.0), min(max(y, 0.0), 1.0)))
        mask |= brushed(torch.tensor(points, dtype=torch.float64) * resolution, radius, resolution)
    dims = [dim for dim in (0, 1) if next(draw) < 0.5]
    return mask.flip(dims)


def brushed(points: Tensor, radius: float, resolution: int) -> Tensor:
    """Pixels with centers within `radius` of the lines through points (P, 2), x and y: (S, S) bool."""
    centers = torch.arange(resolution, dtype=torch.float64) + 0.5
    pixel = torch.stack(torch.meshgrid(centers, centers, indexing="xy"), dim=-1)[:, :, None]  # (S, S, 1, 2)
    start, along = points[:-1], points.diff(dim=0)  # (P - 1, 2)
    place = ((pixel - start) * along).sum(-1) / along.square().sum(-1).clamp(min=1e-12)  # (S, S, P - 1)
    nearest = start + place.clamp(0, 1)[..., None] * along
    return ((pixel - nearest).square().sum(-1) <= radius**2).any(-1)


def between(limits: tuple[float, float], number: float) -> float:
    """Map a number in [0, 1) linearly to the interval between two limits."""
    return limits[0] + number * (limits[1] - limits[0])


MASKS = {"inpainting": inpainting_mask, "uncropping": border_mask}  # some pixels stay
MASK_TASKS = tuple(MASKS)
TASKS = ("inpainting", "uncropping", "colorization", "jpeg", "super_resolution")


class Degraded(NamedTuple):
    """Degraded images and masks of the unknown pixels, together the condition of the network."""

    image: Tensor  # (B, 3, H, W); noise in the mask of `MASK_TASKS`
    mask: Tensor  # (B, 1, H, W), 1 is unknown

    @property
    def condition(self) -> Tensor:
        """The network's condition (B, 4, H, W): three channels of the image, then the mask."""
        return torch.cat([self.image, self.mask], dim=1)


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
        factors: the factors of super-resolution, among which a draw chooses."""
    images, size = [], image.shape[-1]
    whole_mask = torch.ones(size, size, dtype=torch.bool)
    wanted = list(zip(tasks, numbers.tolist(), strict=True))
    drawn = [MASKS[task](draws, size, area=mask_area) if task in MASKS else whole_mask for task, draws in wanted]
    masks = to_device(torch.stack(drawn)[:, None], image.device).to(image.dtype)
    for row, (task, draws) in enumerate(wanted):
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


def fill_mask(image: Tensor, mask: Tensor, noise: Tensor) -> Tensor:
    """The known pixels exactly, and noise inside the mask: the condition of Palette, section 3."""
    return torch.where(mask > 0, noise, image)


def add_noise_in_mask(objective: Objective, x_0: Tensor, noise: Tensor, time: Tensor, mask: Tensor) -> Tensor:
    """x_t with noise in the mask only; the network sees the other pixels clean."""
    return torch.where(mask > 0, objective.add_noise(x_0, noise, time), x_0)


def loss_in_mask(
    objective: Objective, output: Tensor, *, x_0: Tensor, noise: Tensor, x_t: Tensor, time: Tensor, mask: Tensor
) -> Tensor:
    """The objective's loss (B,) averaged over the pixels of the mask; known pixels do not count.
    The error of every target that is linear in x_0, noise and x_t is zero where these three and the output are zero, so
    the mean over all pixels, divided by the mask's share of them, is the mean over the mask. A learned variance is not
    linear, and image-to-image models have none."""
    whole = objective.loss(output * mask, x_0=x_0 * mask, noise=noise * mask, x_t=x_t * mask, time=time)
    return whole / mask.mean(dim=(1, 2, 3))


def denoise_in_mask(
    denoise: Callable[[Tensor, Tensor], Tensor], known: Tensor, mask: Tensor
) -> Callable[[Tensor, Tensor], Tensor]:
    """Wrap `denoise` to restore known pixels (B, 3, H, W) before each step: x_t = m x_t + (1 - m) x_0."""
    return lambda x_t, time: denoise(torch.where(mask > 0, x_t, known), time)
