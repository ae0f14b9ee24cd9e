"""Likelihood of tokens under the prior.

Shapes: B batch, N tokens a picture, K codebook_size.
"""

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor


def token_loss(logits: Tensor, *, tokens: Tensor) -> Tensor:
    """Mean negative log likelihood in nats a token, () in fp32; log K for a uniform model.

    Args:
        logits: (B, N, K), logits[:, i] from tokens before i only.
        tokens: (B, N) int64 in [0, K).
    """
    return F.cross_entropy(rearrange(logits, "b n k -> (b n) k").float(), tokens.flatten())
