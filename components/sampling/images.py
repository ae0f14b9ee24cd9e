"""Images that a model is given, from their files. Shapes: S = resolution."""

import io

import numpy as np
import torch
from einops import rearrange
from PIL import Image, UnidentifiedImageError
from torch import Tensor


def open_image(data: bytes, *, mode: str = "RGB") -> Image.Image:
    """An image file, decoded to a mode of Pillow's. Raises ValueError if it is none."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.convert(mode)
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"the given image can't be read ({error}); give a PNG") from error


def read_image(data: bytes, *, resolution: int) -> Tensor:
    """An image file as (3, S, S) in [-1, 1]; other sizes are area-averaged. Raises ValueError if it is none."""
    return as_tensor(open_image(data).resize((resolution, resolution), Image.Resampling.BOX))


def as_tensor(image: Image.Image) -> Tensor:
    """An RGB image as (3, H, W) in [-1, 1]."""
    return rearrange(torch.from_numpy(np.array(image)).float() / 127.5 - 1, "h w c -> c h w")
