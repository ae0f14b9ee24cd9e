"""From the rows that data readers give to the batches that tasks take."""

import numpy as np
import torch

from components.sampling.images import from_uint8
from components.training.loop import Arrays, Batch

IMAGES = ("image", "condition_image")
ARRAYS = ("latents", "image_embedding", "text_states", "text_embedding")  # made beforehand
TENSORS = (*IMAGES, *ARRAYS, "label", "text", "tokens", "condition", "task", "position")


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
