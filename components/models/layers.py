"""Shared parts of networks: timestep embedding, group norm, attention over positions.

Shapes: B batch, C channels, H W height and width, D embedding size.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from components.models.autocast import autocast


def timestep_embedding(timesteps: Tensor, dim: int) -> Tensor:
    """Sinusoidal embedding (B, dim) float32 of timesteps (B,), cosines first (Vaswani et al., 2017).

    As in Ho et al. (2020). Frequencies are exp(-ln(10000) i / half) with half = dim / 2, which must be whole.
    """
    half = dim // 2
    frequencies = torch.exp(-math.log(10_000) / half * torch.arange(half, device=timesteps.device))
    angles = timesteps.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def groups_of(channels: int, norm_groups: int | None) -> int:
    """Groups of a group norm: `norm_groups` where given, else at most 32 of at least four channels.

    Published networks have 32 groups at any width; four channels a group are a rule of Karras et al. (2022).

    One channel a group, as 32 groups of 32 channels would have, erases every channel's mean.
    """
    return norm_groups or math.gcd(channels, min(32, channels // 4))


class GroupNorm(nn.GroupNorm):
    """Group norm with statistics in fp32, under autocast too.

    On a CPU it returns the dtype of its weights, for the bf16 kernel for channels_last is several times slower there.
    Elsewhere it returns the dtype that it was given, as `Normalized16Bits`: what follows keeps half of the bytes.

    Args:
        norm_groups: see `groups_of`.

    Raises ValueError if they don't divide the channels.
    """

    def __init__(self, channels: int, *, norm_groups: int | None = None, eps: float = 1e-5) -> None:
        super().__init__(groups_of(channels, norm_groups), channels, eps=eps)

    def forward(self, input: Tensor) -> Tensor:  # (B, C, ...)
        if input.device.type == "cpu" or input.dtype == self.weight.dtype:
            return super().forward(input.to(self.weight.dtype))
        return Normalized16Bits.apply(input, self.weight, self.bias, self.num_groups, self.eps)


class Normalized16Bits(torch.autograd.Function):
    """Group norm of x (B, C, ...) of 16 bits in fp32, returned in 16 bits.

    The backward pass keeps x itself, not the copy of twice the bytes that `x.float()` would leave there: 2.9 GB for a
    sample of ADM at 256² in place of 4.0.
    """

    @staticmethod
    def forward(  # pyrefly: ignore[bad-override]
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float
    ) -> Tensor:
        whole, sizes = x.to(weight.dtype).contiguous(), (len(x), x.shape[1], x[0, 0].numel())
        y, mean, rstd = torch.native_group_norm(whole, weight, bias, *sizes, num_groups, eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.num_groups = num_groups
        return y.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        x, weight, mean, rstd = ctx.saved_tensors
        given, sizes = (gradient.to(weight.dtype).contiguous(), x.to(weight.dtype).contiguous()), x.shape[:2]
        moments, needed = (mean, rstd, weight), ctx.needs_input_grad[:3]
        of_x, of_weight, of_bias = torch.ops.aten.native_group_norm_backward(
            *given, *moments, *sizes, x[0, 0].numel(), ctx.num_groups, needed
        )
        return (None if of_x is None else of_x.to(x.dtype)), of_weight, of_bias, None, None


def zeroed(module: nn.Module) -> nn.Module:
    """Set all parameters to zero: a residual branch with such an end starts as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def attend(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """Scaled dot-product attention with a softmax in fp32, on (B, heads, L, head_dim).

    Args:
        mask: boolean, broadcast to (B, heads, L, L), True where a key may be seen.
        causal: each query sees the keys up to its own position; without a mask only.
    """
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    with autocast(q.device, enabled=False):  # the CPU kernel's bf16 backward is several times slower than fp32
        dtype = torch.promote_types(q.dtype, torch.float32)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)


class SelfAttention2d(nn.Module):
    """Residual attention among all positions of a feature map.

    Sources: Ho et al. (2020), Dhariwal and Nichol (2021).

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
