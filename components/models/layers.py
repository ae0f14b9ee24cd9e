"""Parts that several networks share: timestep embedding, group norm, attention over positions.

Shapes: B batch, C channels, H W height and width, D embedding size.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


def timestep_embedding(timesteps: Tensor, dim: int) -> Tensor:
    """Sinusoidal embedding (B, dim) float32 of timesteps (B,), cosines first (Vaswani et al., 2017; Ho et al., 2020).

    Frequencies are exp(-ln(10000) i / half) with half = dim / 2, which must be whole.
    """
    half = dim // 2
    frequencies = torch.exp(-math.log(10_000) / half * torch.arange(half, device=timesteps.device))
    angles = timesteps.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def group_norm(channels: int, *, eps: float = 1e-5) -> nn.GroupNorm:
    """GroupNorm with 32 groups, or fewer so that each group keeps four channels (Karras et al., 2022).

    One channel a group, as 32 groups of 32 channels would have, erases every channel's mean.
    """
    return nn.GroupNorm(min(32, channels // 4), channels, eps=eps)


def zeroed(module: nn.Module) -> nn.Module:
    """Set all parameters to zero: a residual branch that ends in this module starts as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


class SelfAttention2d(nn.Module):
    """Residual attention among all positions of a feature map (Ho et al., 2020; Dhariwal and Nichol, 2021).

    Args:
        channels: a multiple of num_heads.
        num_heads: queries, keys and values are outermost in the projection ("new attention order"), heads inside.
    """

    def __init__(self, channels: int, *, num_heads: int = 1, eps: float = 1e-5) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = group_norm(channels, eps=eps)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = zeroed(nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, C, H, W)
        h = rearrange(self.norm(x), "b c h w -> b (h w) c")  # a view when x is channels_last
        q, k, v = rearrange(self.qkv(h), "b n (three heads d) -> three b heads n d", three=3, heads=self.num_heads)
        h = F.scaled_dot_product_attention(q, k, v)  # softmax runs in fp32 inside, also for bf16 operands
        h = self.proj(rearrange(h, "b heads n d -> b n (heads d)"))
        return x + rearrange(h, "b (h w) c -> b c h w", h=x.shape[2])
