"""From the rows that data readers give to the batches that tasks take; and small PNG grids of what a model makes."""

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from components.sampling.image_files import encode_png, enlarged
from components.sampling.images import from_uint8, to_uint8
from components.training.loop import Arrays, Batch

IMAGES = ("image", "condition_image")
ARRAYS = ("latents", "image_embedding", "text_states", "text_embedding")  # made beforehand
TENSORS = (*IMAGES, *ARRAYS, "label", "text", "tokens", "condition", "task", "position")
SMALLEST = 64  # pixels: smaller images are enlarged without smoothing, so that a browser shows them as they are


def to_batch(rows: Arrays, device: torch.device | str = "cpu") -> Batch:
    """Arrays by name -> tensors on `device`; images uint8 (B, H, W, 3) -> float32 (B, 3, H, W) in [-1, 1], what
    frozen networks made beforehand to float32, the rest to int64.

    Columns that no task reads (captions, keys) are left out. A column of rows comes as objects from some readers.
    """
    batch = {}
    for name in TENSORS:
        if name in rows:
            column = rows[name]
            stacked = np.stack(list(column)) if column.dtype == object else np.ascontiguousarray(column)
            tensor = torch.from_numpy(stacked if stacked.flags.writeable else stacked.copy()).to(device)
            batch[name] = from_uint8(tensor) if name in IMAGES else tensor.float() if name in ARRAYS else tensor.long()
    return batch


def with_positions(batch: Batch) -> Batch:
    """Held-out samples have no place in the stream: number them in their own order."""
    samples = len(next(iter(batch.values())))
    device = next(iter(batch.values())).device
    return {**batch, "position": torch.arange(samples, device=device)}


def png_grid(images: Tensor, *, columns: int) -> bytes:
    """Lay images (N, 3, H, W) in [-1, 1] row by row into a PNG; N is a multiple of `columns`."""
    factor = max(1, SMALLEST // images.shape[-1])
    grid = rearrange(to_uint8(images), "(rows columns) h w c -> (rows h) (columns w) c", columns=columns)
    return encode_png(enlarged(grid, height=factor * len(grid), width=factor * grid.shape[1]))
