"""Small PNG grids of what a model makes while it is trained."""

import io

from einops import rearrange, repeat
from PIL import Image
from torch import Tensor

SMALLEST = 64  # pixels: smaller images are enlarged without smoothing, so that a browser shows them as they are


def png_grid(images: Tensor, *, columns: int) -> bytes:
    """Lay images (N, 3, H, W) in [-1, 1] row by row into a PNG; N is a multiple of `columns`."""
    factor = max(1, SMALLEST // images.shape[-1])
    pixels = ((images.detach().cpu().float().clamp(-1, 1) + 1) * 127.5).round().byte()
    large = repeat(pixels, "n c h w -> n c (h fh) (w fw)", fh=factor, fw=factor)
    grid = rearrange(large, "(rows columns) c h w -> (rows h) (columns w) c", columns=columns)
    file = io.BytesIO()
    Image.fromarray(grid.numpy()).save(file, format="PNG")
    return file.getvalue()
