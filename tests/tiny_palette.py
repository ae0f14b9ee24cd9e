"""A tiny image-to-image model with random weights, and images and masks for it."""

from pathlib import Path
from typing import Any

import numpy as np

from components.models.diffusion.corruption import TASKS
from components.sampling.cascade import compose
from tests.tiny_cascade import CLASSES, FEW, OBJECTIVE, TEXT, UNET, write_model

SIDE = 16
PALETTE = {"role": "image_to_image", "resolution": SIDE, "objective": OBJECTIVE, "classes": CLASSES}
PALETTE |= {"tasks": list(TASKS), "super_resolution_factors": [2, 4], "mask_area": [0.1, 0.5]}


def write_palette(folder: Path, *, text: bool = False, **settings: Any) -> Path:
    """A cascade of nothing but an image-to-image model with random weights."""
    network = UNET | {"resolution": SIDE, "num_classes": None, "text": TEXT if text else None}
    network |= {"condition_image_channels": 4}
    model = write_model(folder / "palette", "unet", network, PALETTE | settings)
    return compose(folder / "cascade", model=model, sampling={"model": FEW})


def pixels(seed: int, side: int = SIDE) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)


def hidden(left: int = 4, side: int = SIDE) -> np.ndarray:
    where = np.zeros((side, side), bool)
    where[3:12, left : left + 6] = True
    return where
