"""Batches of tensors from rows of arrays, sent ahead to the device; PNG grids of a model's images."""

import warnings
from collections.abc import Iterator
from itertools import chain, pairwise
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from components.models.devices import to_device
from components.sampling.image_files import encode_png, enlarged
from components.sampling.images import from_uint8, to_uint8
from components.training.loop import Arrays, Batch

IMAGES = ("image", "condition_image")
ARRAYS = ("latents", "image_embedding", "text_states", "text_embedding")  # of an encoded set
TENSORS = (*IMAGES, *ARRAYS, "label", "text", "tokens", "condition", "task", "position")
ON_HOST = ("position", "task")
SMALLEST = 64  # pixels: smaller images are enlarged, for browsers would smooth them


def to_batch(rows: Arrays, device: torch.device | str = "cpu") -> Batch:
    """Converts rows of arrays to tensors on `device`; columns ON_HOST stay, columns without a reader go.
    Images uint8 (B, H, W, 3) become float32 (B, 3, H, W) in [-1, 1], encoded arrays float32, all else int64."""
    batch = {}
    for name in TENSORS:
        if name in rows:
            column = rows[name]  # of objects, from some readers; else its memory is shared
            column = np.stack(list(column)) if column.dtype == object else np.ascontiguousarray(column)
            with warnings.catch_warnings():  # of memory that no task writes to
                warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
                tensor = to_device(torch.from_numpy(column), "cpu" if name in ON_HOST else device)
            batch[name] = from_uint8(tensor) if name in IMAGES else tensor.float() if name in ARRAYS else tensor.long()
    return batch


def batches_ahead(rows: Iterator[Arrays], device: torch.device) -> Iterator[Batch]:
    """`to_batch` of all rows; on a GPU each batch is sent while the earlier batch is trained on."""
    if device.type != "cuda":
        yield from (to_batch(arrays, device) for arrays in rows)
        return
    sending = torch.cuda.Stream(device)

    def send(arrays: Arrays) -> tuple[Batch, torch.cuda.Event]:
        with torch.cuda.stream(sending):
            batch, arrival = to_batch(arrays, device), torch.cuda.Event()
            arrival.record(sending)
        return batch, arrival

    end: Any = None
    for (batch, arrival), _ in pairwise(chain(map(send, rows), [end])):  # the next one is sent before this one is used
        stream = torch.cuda.current_stream(device)
        stream.wait_event(arrival)  # the GPU waits for the transfer, the host doesn't
        for tensor in batch.values():
            if tensor.device.type == "cuda":
                tensor.record_stream(stream)  # so that the allocator does not reuse the memory too early
        yield batch


def with_positions(batch: Batch) -> Batch:
    """Numbers held-out samples in order, since they have no position in the stream."""
    samples = len(next(iter(batch.values())))
    return {**batch, "position": torch.arange(samples)}


def png_grid(images: Tensor, *, columns: int) -> bytes:
    """Lay images (N, 3, H, W) in [-1, 1] row by row into a PNG; N is a multiple of `columns`."""
    factor = max(1, SMALLEST // images.shape[-1])
    grid = rearrange(to_uint8(images), "(rows columns) h w c -> (rows h) (columns w) c", columns=columns)
    return encode_png(enlarged(grid, height=factor * len(grid), width=factor * grid.shape[1]))
