"""Patches of an image as tokens for the attention of another image, all embedded alike.

The places of the patches come from attention (`rotary.py`).

Shapes: B batch, H W pixels, P patch_size, L = H / P * W / P tokens, E features of a token.
"""

from einops import rearrange
from torch import Tensor, nn


class ImageTokens(nn.Module):
    """Patch embedding, normalized (Dosovitskiy et al., 2021, equation 1, without positions).

    Args:
        channels: of the image.
        resolution: H = W, a multiple of patch_size.
        token_dim: E.

    Raises:
        ValueError: the resolution can't be divided so.
    """

    def __init__(self, *, channels: int, resolution: int, patch_size: int, token_dim: int) -> None:
        super().__init__()
        if resolution % patch_size:
            raise ValueError(f"resolution {resolution} is not a multiple of image_patch_size {patch_size}")
        self.grid = resolution // patch_size
        self.patches = nn.Conv2d(channels, token_dim, patch_size, stride=patch_size)
        self.norm = nn.LayerNorm(token_dim)

    def forward(self, image: Tensor) -> Tensor:  # (B, channels, H, W) -> (B, L, E)
        return self.norm(rearrange(self.patches(image), "b e h w -> b (h w) e"))
