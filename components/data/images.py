"""Decoding of image files to upright RGB squares, also of depth maps and masks; degradation by JPEG.

Shapes: N images, H = W = resolution; images are uint8 (H, W, 3), 0..255.
"""

import io
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image
from simplejpeg import decode_jpeg

from components.sampling.image_files import decode_image, open_header, open_image

JPEG = "jpeg"
SMALLEST = 2  # pixels of a side of an image to learn; of 1 are marks that count visits
STREAM = 0x6465  # separates draws of degradations from those of the order


def decode_sample(data: bytes) -> Image.Image:
    """Decodes an image that is to be learned, as `decode_image`.
    Raises ValueError also for a side below SMALLEST."""
    image = decode_image(data)
    if min(image.size) < SMALLEST:
        raise ValueError(f"{image.width} x {image.height} pixels: nothing to learn")
    return image


def center_square(image: Image.Image) -> Image.Image:
    """Crops to the largest square around the center."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image if image.size == (side, side) else image.crop((left, top, left + side, top + side))


def fit_square(
    image: Image.Image, resolution: int, *, last: Image.Resampling = Image.Resampling.BICUBIC
) -> Image.Image:
    """Center crop to a square, then resize with antialiasing.
    Halving with a box filter while the side is at least twice the target, then one step of the filter `last`: the
    preparation of the ADM training data (Dhariwal & Nichol, 2021, `center_crop_arr`), with the crop first."""
    image = center_square(image)
    side = image.width
    while side >= 2 * resolution:
        side //= 2
        image = image.resize((side, side), Image.Resampling.BOX)
    return image if side == resolution else image.resize((resolution, resolution), last)


def load_image(data: bytes, *, resolution: int) -> np.ndarray:
    """Reads an image file -> uint8 (resolution, resolution, 3). Raises as `decode_image`."""
    out = np.empty((resolution, resolution, 3), np.uint8)
    load_into(out, data)
    return out


def load_into(out: np.ndarray, data: bytes) -> None:
    """Set `out`, uint8 (H, W, 3), contiguous, to the image of a file. Raises as `decode_image`.
    A JPEG that needs only decoding is decoded in place, by the library inside Pillow: the same pixels, sooner."""
    image = open_header(data)
    upright = image.getexif().get(ExifTags.Base.Orientation, 1) == 1
    if image.format == "JPEG" and image.mode == "RGB" and image.size == out.shape[:2] and upright:
        try:
            decode_jpeg(data, buffer=out)
        except ValueError:  # damaged: Pillow says how, or mends it
            out[...] = np.asarray(decode_image(data))
        return
    out[...] = np.asarray(fit_square(decode_image(data), len(out)))


def load_depth(data: bytes, *, resolution: int) -> np.ndarray:
    """Reads a depth map as relative inverse depth, a gray image, uint8 (resolution, resolution, 3).
    255 (1/d - 1/d_max) / (1/d_min - 1/d_max) over the image's central square: nearest 255, farthest 0, in any unit of
    d, as monocular depth networks give it (Ranftl et al., 2020). A 0 in the file means no measurement, and is 0 in the
    image too; so is a map of one depth only. Resized after the conversion (box and bilinear filters)."""
    depth = np.asarray(center_square(_single_channel(data)), dtype=np.float64)  # (h, h)
    inverse = np.divide(1.0, depth, out=np.zeros_like(depth), where=depth > 0)
    nearest, farthest = inverse.max(), inverse.min(where=depth > 0, initial=np.inf)
    span = nearest - farthest if nearest > farthest else np.inf
    relative = np.clip((inverse - min(farthest, nearest)) / span, 0, 1)
    gray = fit_square(Image.fromarray(relative.astype(np.float32)), resolution, last=Image.Resampling.BILINEAR)
    return _equal_channels(255 * np.asarray(gray))


def load_mask(data: bytes, *, resolution: int, mask_values: int) -> np.ndarray:
    """Reads a mask with values 0 .. mask_values - 1 as a gray image, uint8 (resolution, resolution, 3).
    A value v becomes 255 v / (mask_values - 1). Resized to the nearest neighbor, which mixes no two values. Raises
    ValueError for a larger value: a value is the same gray in all images of a set."""
    image = center_square(_single_channel(data)).resize((resolution, resolution), Image.Resampling.NEAREST)
    mask = np.asarray(image).astype(np.float64)
    if mask.max() >= mask_values:
        held = f"the mask holds the value {int(mask.max())}, the set's masks 0 to {mask_values - 1}"
        raise ValueError(f"{held}; set mask_values in index.json to the number of values")
    return _equal_channels(255 * mask / (mask_values - 1))


def _single_channel(data: bytes) -> Image.Image:
    """Opens a file of one number a pixel (gray, 16-bit, palette indices). Raises ValueError for colors."""
    image = open_image(data)
    if len(image.getbands()) > 1:
        raise ValueError(f"one number a pixel is needed, not {image.mode}")
    return image


def _equal_channels(gray: np.ndarray) -> np.ndarray:  # (H, W) in [0, 255] -> uint8 (H, W, 3)
    return np.repeat(np.rint(gray).astype(np.uint8)[:, :, None], 3, axis=2)


class Degradation(NamedTuple):
    """Degradations to draw from for each position: a task, uniformly, and for JPEG a uniform quality."""

    seed: int
    tasks: tuple[str, ...]
    jpeg_qualities: tuple[int, int] = (5, 30)  # lowest and highest


def degrade(images: np.ndarray, position: np.ndarray, degradation: Degradation) -> dict[str, np.ndarray]:
    """Draws a degradation for each image of a batch, and applies JPEG, the only one that needs an encoder.
    The others are made of tensors, in components/models/diffusion/corruption.py. Palette, Saharia et al. (2022),
    section 4: one model for all tasks. A draw is a function of (seed, position), so it depends neither on the batch nor
    on the ranks. `images`: uint8 (N, H, W, 3). `position`: (N,) places in the stream, >= 0. Returns two more columns of
    the batch: `task`, int64 (N,), places in degradation.tasks; `condition_image`, uint8 (N, H, W, 3), the images after
    JPEG where JPEG is the task, and unchanged elsewhere."""
    lowest, highest = degradation.jpeg_qualities
    keys = [np.random.SeedSequence((degradation.seed, STREAM, place)) for place in position.tolist()]
    draws = np.stack([np.random.Philox(key).random_raw(2) for key in keys])  # (N, 2) uint64
    task = (draws[:, 0] % np.uint64(len(degradation.tasks))).astype(np.int64)
    condition = images.copy()
    for row in np.flatnonzero(np.array(degradation.tasks)[task] == JPEG):
        quality = lowest + int(draws[row, 1]) % (highest - lowest + 1)
        condition[row] = jpeg_compressed(images[row], quality=quality)
    return {"task": task, "condition_image": condition}


def jpeg_compressed(image: np.ndarray, *, quality: int) -> np.ndarray:
    """An image (H, W, 3) after JPEG of a quality in [1, 95], with the usual halved color resolution."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, format="JPEG", quality=quality)
    return np.asarray(Image.open(file).convert("RGB"))
