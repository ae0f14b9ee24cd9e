"""Rotary positions: attention by the distance of queries and keys (Su et al., 2021).

Shapes: B batch, H heads, S sequence, E head_dim.
"""

import torch
from torch import Tensor


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Turn each pair of features of x (B, H, S, E) by the position's angle (Su et al. 2021, eq. 34).

    Products of rotated queries and keys depend on the difference of their angles alone.

    Args:
        rotation: (S, E / 2, 2), cosine and sine of each pair's angle.
    """
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)  # (B, H, S, E / 2)
    cos, sin = rotation.unbind(-1)  # (S, E / 2)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2).to(x.dtype)


def grid_rotation(
    height: int,
    width: int,
    *,
    head_dim: int,
    theta: float = 10000.0,
    pitch: float = 1.0,
    device: torch.device | None = None,
) -> Tensor:
    """Rotations of the places of a grid in raster order, (height * width, E / 2, 2): cosine and sine.

    Axial (Heo et al., 2024): the first half of the features turns with the row, the second with the column, each pair
    slower than the one before by the same factor, down to about 1 / theta.

    Args:
        pitch: distance between neighbors; half of it lies around the grid, so that n places at 1 and 2 n at 1/2 cover
            the same square. At 1 the first place is not turned at all.
    """
    frequencies = theta ** -(torch.arange(0, head_dim // 2, 2, device=device) / (head_dim // 2))  # (E / 4,)
    rows, columns = ((torch.arange(size, device=device) + 0.5) * pitch - 0.5 for size in (height, width))
    places = torch.cartesian_prod(rows, columns)  # (N, 2)
    angles = (places[:, :, None] * frequencies).flatten(1)  # (N, E / 2)
    return torch.stack([angles.cos(), angles.sin()], dim=-1)
