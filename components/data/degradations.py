"""Which degradation each sample goes through, and the one that needs an encoder: JPEG, made where images are read.

The others (masks, borders, gray, fewer pixels) are made of tensors, see components/models/diffusion/degradation.py.
Palette, Saharia et al. (2022), section 4: one model for all tasks. Shapes: N images, uint8 (N, H, W, 3).
"""

import io
from typing import NamedTuple

import numpy as np
from PIL import Image

JPEG = "jpeg"
STREAM = 0x6465  # sets these draws apart from those of the order of the same seed


class Degradation(NamedTuple):
    """What is drawn for each position: a task, each alike, and for JPEG a quality, each alike."""

    seed: int
    tasks: tuple[str, ...]
    jpeg_qualities: tuple[int, int] = (5, 30)  # lowest and highest


def degrade(images: np.ndarray, position: np.ndarray, degradation: Degradation) -> dict[str, np.ndarray]:
    """Two more columns of a batch: `task`, int64 (N,), places in degradation.tasks; `condition_image`, uint8
    (N, H, W, 3), the images after JPEG where that is the task, and as they are elsewhere.

    What is drawn for an image is a function of (seed, position), so it depends neither on the batch nor on the ranks.

    Args:
        images: (N, H, W, 3).
        position: (N,) places in the stream, >= 0.
    """
    lowest, highest = degradation.jpeg_qualities
    draws = np.stack([_draws(degradation.seed, place) for place in position.tolist()])  # (N, 2) uint64
    task = (draws[:, 0] % np.uint64(len(degradation.tasks))).astype(np.int64)
    condition = images.copy()
    for row in np.flatnonzero(np.array(degradation.tasks)[task] == JPEG):
        quality = lowest + int(draws[row, 1]) % (highest - lowest + 1)
        condition[row] = jpeg_compressed(images[row], quality=quality)
    return {"task": task, "condition_image": condition}


def jpeg_compressed(image: np.ndarray, *, quality: int) -> np.ndarray:
    """An image (H, W, 3) after JPEG of a quality in [1, 95], with the encoder's usual halved color resolution."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, format="JPEG", quality=quality)
    return np.asarray(Image.open(file).convert("RGB"))


def _draws(seed: int, place: int) -> np.ndarray:  # (2,) uint64
    return np.random.Philox(np.random.SeedSequence((seed, STREAM, place))).random_raw(2)
