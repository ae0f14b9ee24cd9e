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


def groups_of(channels: int, norm_groups: int | None) -> int:
    """Groups of a group norm: `norm_groups` where it is given, as published networks have 32 at any width; else 32, or
    fewer so that each keeps four channels (Karras et al., 2022).

    One channel a group, as 32 groups of 32 channels would have, erases every channel's mean.
    """
    return norm_groups or math.gcd(channels, min(32, channels // 4))


class GroupNorm(nn.GroupNorm):
    """Group norm that runs in the dtype of its weights, so in fp32 under autocast: safer, and on CPUs the bf16 kernel
    for channels_last is several times slower.

    Args:
        norm_groups: see `groups_of`.

    Raises ValueError if they don't divide the channels.
    """

    def __init__(self, channels: int, *, norm_groups: int | None = None, eps: float = 1e-5) -> None:
        super().__init__(groups_of(channels, norm_groups), channels, eps=eps)

    def forward(self, input: Tensor) -> Tensor:  # (B, C, ...) of any dtype -> the dtype of the weights
        return super().forward(input.to(self.weight.dtype))


def zeroed(module: nn.Module) -> nn.Module:
    """Set all parameters to zero: a residual branch that ends in this module starts as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def attend(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """Scaled dot-product attention with its softmax in fp32, on (B, heads, L, head_dim).

    Args:
        mask: boolean, broadcast to (B, heads, L, L), True where a key may be seen.
        causal: each query sees the keys up to its own position; without a mask only.
    """
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    with torch.autocast("cpu", enabled=False):  # the CPU kernel's bf16 backward is several times slower than fp32
        dtype = torch.promote_types(q.dtype, torch.float32)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)


class SelfAttention2d(nn.Module):
    """Residual attention among all positions of a feature map (Ho et al., 2020; Dhariwal and Nichol, 2021).

    Args:
        channels: a multiple of num_heads.
        num_heads: queries, keys and values are outermost in the projection ("new attention order"), heads inside.
        norm_groups: see `groups_of`.
    """

    def __init__(self, channels: int, *, num_heads: int, norm_groups: int | None = None, eps: float = 1e-5) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = GroupNorm(channels, norm_groups=norm_groups, eps=eps)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)  # pointwise: on CPUs faster than nn.Linear in fp32
        self.proj = zeroed(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, C, H, W)
        qkv = self.qkv(self.norm(x))
        q, k, v = rearrange(qkv, "b (three heads d) h w -> three b heads (h w) d", three=3, heads=self.num_heads)
        h = attend(q, k, v)
        return x + self.proj(rearrange(h, "b heads (h w) d -> b (heads d) h w", h=x.shape[2]))
