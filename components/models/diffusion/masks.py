"""Masks of unknown pixels: brush strokes, rectangles and borders, as functions of numbers in [0, 1).

One convention: a `mask` is 1 where a pixel is unknown (Palette; Saharia et al., 2022). GLIDE's mask is the opposite.
Shapes: S = resolution, height and width.
"""

import math
from collections.abc import Sequence
from statistics import NormalDist

import torch
from torch import Tensor

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

    Args:
        numbers: NUMBERS draws in [0, 1).
        area: least and greatest share of the image that a rectangle hides; strokes have their own sizes, from Yu et al.
    """
    if numbers[0] < RECTANGLES:
        return rectangle(numbers[1:], resolution, area=area)
    return strokes(numbers[1:], resolution)


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

    The width w solves (1 - n w)(1 - m w) = 1 - a for a hidden share a and n, m sides of the two directions.

    Args:
        area: least and greatest share of the image that is hidden.
    """
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
            length = min(max(0.0, _normal(next(draw), LENGTH, LENGTH / 2)), 2 * LENGTH)
            x, y = points[-1][0] + length * math.cos(angle), points[-1][1] + length * math.sin(angle)
            points.append((min(max(x, 0.0), 1.0), min(max(y, 0.0), 1.0)))
        mask |= brushed(torch.tensor(points, dtype=torch.float64) * resolution, radius, resolution)
    dims = [dim for dim in (0, 1) if next(draw) < 0.5]
    return mask.flip(dims)


def brushed(points: Tensor, radius: float, resolution: int) -> Tensor:
    """Pixels with centers within `radius` of the lines through points (P, 2): (S, S) bool.

    Points are x and y in pixels.
    """
    centers = torch.arange(resolution, dtype=torch.float64) + 0.5
    pixel = torch.stack(torch.meshgrid(centers, centers, indexing="xy"), dim=-1)[:, :, None]  # (S, S, 1, 2)
    start, along = points[:-1], points.diff(dim=0)  # (P - 1, 2)
    place = ((pixel - start) * along).sum(-1) / along.square().sum(-1).clamp(min=1e-12)  # (S, S, P - 1)
    nearest = start + place.clamp(0, 1)[..., None] * along
    return ((pixel - nearest).square().sum(-1) <= radius**2).any(-1)


def between(limits: tuple[float, float], number: float) -> float:
    """Map a number in [0, 1) linearly to the interval between two limits."""
    return limits[0] + number * (limits[1] - limits[0])


def _normal(number: float, mean: float, deviation: float) -> float:
    """Map a number in [0, 1) to a normal distribution by the inverse distribution function."""
    return NormalDist(mean, deviation).inv_cdf(max(number, 1e-9))
