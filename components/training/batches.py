"""Batches of tensors from rows of arrays, sent ahead to the device; PNG grids of a model's images."""

import warnings
from collections.abc import Iterator
from typing import NamedTuple, TypeVar

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
SMALLEST = 64  # pixels: smaller images are enlarged without smoothing, for browsers that would smooth them

Item = TypeVar("Item")


def to_batch(rows: Arrays, device: torch.device | str = "cpu") -> Batch:
    """Converts rows of arrays to a batch of tensors on `device`.

    Images uint8 (B, H, W, 3) become float32 (B, 3, H, W) in [-1, 1], arrays of an encoded set float32, all else int64.
    Columns that the host reads, to draw and to choose by, stay there. Columns that no task reads (captions, keys) are
    left out.
    """
    batch = {}
    for name in TENSORS:
        if name in rows:
            tensor = to_device(tensor_of(rows[name]), "cpu" if name in ON_HOST else device)
            batch[name] = from_uint8(tensor) if name in IMAGES else tensor.float() if name in ARRAYS else tensor.long()
    return batch


def tensor_of(column: np.ndarray) -> Tensor:
    """A column as a tensor, without a copy unless it holds objects (arrays of rows, from some readers).

    Readers give memory that must not be written to: no task writes to its batch.
    """
    stacked = np.stack(list(column)) if column.dtype == object else np.ascontiguousarray(column)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(stacked)


class OnItsWay(NamedTuple):
    """A batch in transfer to a GPU, on a CUDA stream of its own."""

    batch: Batch
    arrival: torch.cuda.Event

    def taken(self) -> Batch:
        """The batch, for use on the current stream: the GPU waits for the transfer, the host doesn't.

        Calls `record_stream` so that the allocator does not reuse the memory too early.
        """
        stream = torch.cuda.current_stream(self.batch[next(iter(self.batch))].device)
        stream.wait_event(self.arrival)
        for tensor in self.batch.values():
            if tensor.device.type == "cuda":
                tensor.record_stream(stream)
        return self.batch


def batches_ahead(rows: Iterator[Arrays], device: torch.device) -> Iterator[Batch]:
    """`to_batch` of all rows; on a GPU each batch is sent while the earlier batch is trained on."""
    if device.type != "cuda":
        for arrays in rows:
            yield to_batch(arrays, device)
        return
    stream = torch.cuda.Stream(device)
    for sent in one_ahead(send(arrays, device, stream) for arrays in rows):
        yield sent.taken()


def send(arrays: Arrays, device: torch.device, stream: torch.cuda.Stream) -> OnItsWay:
    """Starts the transfer of a batch to a GPU."""
    with torch.cuda.stream(stream):
        batch, arrival = to_batch(arrays, device), torch.cuda.Event()
        arrival.record(stream)
    return OnItsWay(batch, arrival)


def one_ahead(items: Iterator[Item]) -> Iterator[Item]:
    """The same items; each is taken before the earlier item is yielded."""
    waiting = next(items, None)
    while waiting is not None:
        following = next(items, None)
        yield waiting
        waiting = following


def with_positions(batch: Batch) -> Batch:
    """Numbers held-out samples in order, since they have no position in the stream."""
    samples = len(next(iter(batch.values())))
    return {**batch, "position": torch.arange(samples)}


def png_grid(images: Tensor, *, columns: int) -> bytes:
    """Lay images (N, 3, H, W) in [-1, 1] row by row into a PNG; N is a multiple of `columns`."""
    factor = max(1, SMALLEST // images.shape[-1])
    grid = rearrange(to_uint8(images), "(rows columns) h w c -> (rows h) (columns w) c", columns=columns)
    return encode_png(enlarged(grid, height=factor * len(grid), width=factor * grid.shape[1]))
