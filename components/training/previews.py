"""Small PNG grids of what a model makes while it is trained."""

from einops import rearrange
from torch import Tensor

from components.sampling.image_files import encode_png, enlarged
from components.sampling.images import to_uint8

SMALLEST = 64  # pixels: smaller images are enlarged without smoothing, so that a browser shows them as they are


def png_grid(images: Tensor, *, columns: int) -> bytes:
    """Lay images (N, 3, H, W) in [-1, 1] row by row into a PNG; N is a multiple of `columns`."""
    factor = max(1, SMALLEST // images.shape[-1])
    grid = rearrange(to_uint8(images), "(rows columns) h w c -> (rows h) (columns w) c", columns=columns)
    return encode_png(enlarged(grid, height=factor * len(grid), width=factor * grid.shape[1]))
