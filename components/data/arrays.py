"""Arrays that lie next to the image of a sample, made of it beforehand: latents, embeddings, states of its caption.

They are float16 in numpy's own format (`latents.npy`), so that any reader of WebDataset understands them. What a file
may say of itself is known from the index, so nothing of it is believed, and nothing can be unpickled.

Shapes: N samples.
"""

import io
from collections.abc import Sequence
from functools import cache

import numpy as np
from pydantic import Field

from components.configuration.config import Config
from components.data.errors import ShardError

DTYPE = np.dtype("<f2")


class ArrayInfo(Config):
    """One array of every sample of a set, the member `{name}.npy`."""

    name: str
    shape: tuple[int, ...] = Field(min_length=1)
    made_by: str  # stage and key of the model whose work it is


def write_array(array: np.ndarray) -> bytes:
    """The `.npy` file of an array, rounded to float16."""
    rounded = np.ascontiguousarray(array, DTYPE)
    return header(rounded.shape) + rounded.tobytes()


def parse_arrays(files: Sequence[tuple[str, bytes]], info: ArrayInfo, where: str) -> np.ndarray:
    """(key of a sample, its file) -> float16 (N, ...). Raises ShardError naming `where` and the sample if one is of
    another shape or type than the index says."""
    out, start = np.empty((len(files), *info.shape), DTYPE), header(info.shape)
    for row, (key, file) in zip(out, files, strict=True):
        if len(file) != len(start) + row.nbytes or not file.startswith(start):
            raise ShardError(f"{where}: that of sample {key} is not float16 of shape {info.shape}; make the set again")
        row[...] = np.frombuffer(file, DTYPE, offset=len(start)).reshape(info.shape)
    return out


@cache
def header(shape: tuple[int, ...]) -> bytes:
    """How numpy begins the file of a float16 array of this shape."""
    buffer = io.BytesIO()
    fields = {"descr": np.lib.format.dtype_to_descr(DTYPE), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, fields)
    return buffer.getvalue()
