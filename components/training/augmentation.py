"""Images moved and mirrored at random, each as its position in the stream says.

Shapes: B batch, H W pixels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from components.training.randomness import sample_integers


def shifted(image: Tensor, position: Tensor, *, seed: int, max_shift: int) -> Tensor:
    """Random crops of (B, 3, H, W): each moved by up to max_shift pixels each way, its edge repeated where it left."""
    if max_shift == 0:
        return image
    top, left = (sample_integers(seed, position, stream=f"shift_{axis}", high=2 * max_shift + 1) for axis in ("y", "x"))
    padded = F.pad(image, [max_shift] * 4, mode="replicate")
    rows = top[:, None] + torch.arange(image.shape[2], device=image.device)  # (B, H)
    columns = left[:, None] + torch.arange(image.shape[3], device=image.device)  # (B, W)
    sample = torch.arange(len(image), device=image.device)[:, None, None]
    moved = padded.permute(0, 2, 3, 1)[sample, rows[:, :, None], columns[:, None, :]]  # (B, H, W, 3)
    return moved.permute(0, 3, 1, 2)


def mirrored(image: Tensor, position: Tensor, *, seed: int) -> Tensor:
    """Every second one of (B, 3, H, W), drawn at random, with left and right exchanged."""
    mirror = sample_integers(seed, position, stream="mirror", high=2) == 1
    return torch.where(mirror[:, None, None, None], image.flip(3), image)
