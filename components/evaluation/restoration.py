"""Quality of an image-to-image model's restorations of degraded held-out images, task by task.

Palette; Saharia et al., 2022.

Shapes: N images, H W their pixels; images are uint8.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from components.evaluation.grids import GridBlock, readable, render_blocks
from components.models.diffusion.corruption import blurred, downsample, gray
from components.models.diffusion.degradation import MASK_TASKS, NUMBERS, border_mask, inpainting_mask
from components.sampling.image_files import encode_png
from components.sampling.images import from_uint8, to_uint8
from components.sampling.model import SamplingModel
from components.sampling.plan import random_stream
from components.sampling.requests import Request

JPEG_QUALITIES = (5, 10, 20)  # qualities of the paper's evaluation
ROUNDING = 1 / 12  # variance of rounding to 8 bits: no squared error is measured below
HIDDEN = 127  # gray level of unknown pixels in shown images
SHOWN = 8


class Damaged(NamedTuple):
    """Images after a degradation, and the requests to restore the images."""

    name: str  # "inpainting", "jpeg quality 5", "super resolution 4 times"
    shown: np.ndarray  # (N, H, W, 3) what is left of the image, gray elsewhere
    mask: np.ndarray  # (N, H, W) bool, True where pixels are to be made
    requests: tuple[Request, ...]


class Restoration(NamedTuple):
    """Degraded, restored and original images of a degradation."""

    name: str
    degraded: np.ndarray  # (N, H, W, 3)
    restored: np.ndarray  # (N, H, W, 3)
    original: np.ndarray  # (N, H, W, 3)
    mask: np.ndarray  # (N, H, W) bool

    @property
    def psnr(self) -> float:
        """Peak signal-to-noise ratio of the restored images in the mask, dB."""
        return psnr(self.restored, self.original, self.mask)

    @property
    def degraded_psnr(self) -> float:
        """Peak signal-to-noise ratio of the degraded images, dB: the value without any restoration."""
        return psnr(self.degraded, self.original, self.mask)


def damage(
    originals: np.ndarray,
    *,
    tasks: Sequence[str],
    compress: Callable[..., np.ndarray],
    mask_area: tuple[float, float],
    factors: Sequence[int],
    asked: Sequence[Request] | None = None,
    seed: int = 0,
) -> list[Damaged]:
    """Degrades each image in every way of the model's training; equal for equal seeds.

    Args:
        originals: (N, H, W, 3).
        compress: JPEG of one image (H, W, 3), called with quality=; at the qualities of the paper's evaluation.
        mask_area, factors: as in training; each factor of super-resolution is a row of its own.
        asked: N requests with the label or prompt of each image, where the model takes one.
        seed: of masks and of what fills them.
    """
    asked = [Request()] * len(originals) if asked is None else asked
    asked = [request.replace(generator="translate", seed=seed + i) for i, request in enumerate(asked)]
    image = from_uint8(originals)
    found = []
    for task in tasks:
        if task in MASK_TASKS:
            found.append(_with_masks(task, originals, mask_area, asked, seed))
        elif task == "colorization":
            found.append(_changed(task, task, to_uint8(gray(image)), asked))
        elif task == "jpeg":
            for quality in JPEG_QUALITIES:
                left = np.stack([compress(image, quality=quality) for image in originals])
                found.append(_changed(f"jpeg quality {quality}", task, left, asked))
        else:
            for factor in factors:
                small = to_uint8(downsample(image, image.shape[-1] // factor))
                left = to_uint8(blurred(image, factor))
                found.append(_changed(f"super resolution {factor} times", task, left, asked, degraded=small))
    return found


def restorations(
    damaged: Sequence[Damaged], made: Mapping[str, np.ndarray], originals: np.ndarray
) -> list[Restoration]:
    """Restorations of each degradation by name, next to the originals."""
    return [Restoration(each.name, each.shown, made[each.name], originals, each.mask) for each in damaged]


def restoration_figures(found: Sequence[Restoration]) -> dict[str, float]:
    """Metric -> dB, by degradation: the value of the model, and the value without restoration."""
    figures = {}
    for each in found:
        name = each.name.replace(" ", "_")
        figures |= {f"psnr_{name}": each.psnr, f"psnr_{name}_degraded": each.degraded_psnr}
    return figures


def restoration_table(found: Sequence[Restoration], distances: Mapping[str, float]) -> dict[str, Any]:
    """Columns and rows for the report: dB before and after restoration, and distance.

    Args:
        distances: by name, where they were measured.
    """
    return {
        "columns": ["degradation", "given, dB", "restored, dB", "Fréchet distance", "N"],
        "rows": [
            [readable(each.name), each.degraded_psnr, each.psnr, distances.get(each.name), len(each.original)]
            for each in found
        ],
    }


def asked_of(model: SamplingModel, labels: np.ndarray, captions: Sequence[str]) -> list[Request]:
    """Requests with the labels (N,) or captions of the images, as far as the model accepts conditions."""
    bare = [Request()] * len(captions)
    if model.classes:
        bare = [request.replace(label=int(label)) for request, label in zip(bare, labels, strict=True)]
    if model.text is None:
        return bare
    limit = model.text.text_length - 2
    fitting = [c if c.strip() and model.text.num_tokens(c) <= limit else None for c in captions]
    return [request.replace(prompt=caption) for request, caption in zip(bare, fitting, strict=True)]


def draw_restorations(found: Sequence[Restoration], *, columns: int = SHOWN) -> bytes:
    """Rows for each degradation as PNG: the degraded images, the restorations, and the originals."""
    blocks = []
    for each in found:
        name = readable(each.name)
        blocks.append(GridBlock(f"{name}, given ({each.degraded_psnr:.1f} dB)", list(each.degraded[:columns])))
        blocks.append(GridBlock(f"{name}, restored ({each.psnr:.1f} dB)", list(each.restored[:columns])))
    return render_blocks([*blocks, GridBlock("original", list(found[0].original[:columns]))], columns=columns)


def psnr(made: np.ndarray, original: np.ndarray, mask: np.ndarray) -> float:
    """Peak signal-to-noise ratio over the mask's pixels (N, H, W) of all images, dB."""
    errors = np.square(made.astype(np.float64) - original)[mask]
    return 10 * math.log10(255**2 / max(float(errors.mean()), ROUNDING))


def _with_masks(
    task: str, originals: np.ndarray, area: tuple[float, float], asked: Sequence[Request], seed: int
) -> Damaged:
    make, side = inpainting_mask if task == "inpainting" else border_mask, originals.shape[1]
    masks, requests = [], []
    for number, (image, request) in enumerate(zip(originals, asked, strict=True)):
        numbers = torch.rand(NUMBERS, generator=random_stream(seed, f"{task} of image {number}")).tolist()
        masks.append(make(numbers, side, area=area).numpy())
        mask = encode_png(np.where(masks[-1], np.uint8(255), np.uint8(0)))
        requests.append(request.replace(task=task, image=encode_png(image), mask=mask))
    mask = np.stack(masks)
    shown = np.where(mask[..., None], np.uint8(HIDDEN), originals)
    return Damaged(task, shown, mask, tuple(requests))


def _changed(
    name: str, task: str, left: np.ndarray, asked: Sequence[Request], *, degraded: np.ndarray | None = None
) -> Damaged:
    """A degradation of every pixel; `degraded` is the model's input, if smaller than the shown image."""
    images = left if degraded is None else degraded
    requests = tuple(r.replace(task=task, image=encode_png(p)) for r, p in zip(asked, images, strict=True))
    return Damaged(name, left, np.ones(left.shape[:3], dtype=bool), requests)
