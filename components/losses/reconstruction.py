"""Reconstruction loss of the tokenizer (Esser et al. 2021; L1 as in its published code).

Shapes: B batch, H W pixels.
"""

import torch.nn.functional as F
from torch import Tensor


def reconstruction_loss(reconstruction: Tensor, *, image: Tensor) -> Tensor:
    """Mean absolute difference of pictures (B, 3, H, W) in [-1, 1], as () in fp32."""
    return F.l1_loss(reconstruction.float(), image.float())
