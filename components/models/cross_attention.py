"""Attention of an image to tokens: GLIDE's, and the spatial transformer of latent diffusion.
Where the tokens are patches of an image, rotary positions give each query the places of the patches.
Shapes: B batch, C channels, H W height and width, N = H * W positions, L tokens, E features of a token."""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from components.models.conditioned import Context
from components.models.layers import GroupNorm, attend, grid_rotation, rotate, zeroed

THETA = 100.0  # grids of patches are small: with 10,000 most frequencies would be the same everywhere


class TextAttention2d(nn.Module):
    """Residual attention to all positions and to the tokens in a joint softmax (Nichol et al., 2022)."""

    def __init__(self, channels: int, *, num_heads: int, context_dim: int, norm_groups: int | None = None) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = GroupNorm(channels, norm_groups=norm_groups)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.context_kv = nn.Linear(context_dim, 2 * channels)
        self.proj = zeroed(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor, context: Context) -> Tensor:  # (B, C, H, W) -> (B, C, H, W)
        heads = self.num_heads
        qkv = self.qkv(self.norm(x))
        q, k, v = rearrange(qkv, "b (three heads d) h w -> three b heads (h w) d", three=3, heads=heads)
        kv = self.context_kv(context.states)
        context_k, context_v = rearrange(kv, "b l (two heads d) -> two b heads l d", two=2, heads=heads)
        visible = F.pad(context.visible, (0, k.shape[2]), value=True)  # (B, L + N)
        if context.grid:
            here, there = rotations(context, positions=q.shape[2], head_dim=q.shape[3])
            q, k, context_k = rotate(q, here), rotate(k, here), rotate(context_k, there)
        k, v = torch.cat([context_k, k], dim=2), torch.cat([context_v, v], dim=2)  # (B, heads, L + N, d)
        h = attend(q, k, v, mask=visible[:, None, None])
        return x + self.proj(rearrange(h, "b heads (h w) d -> b (heads d) h w", h=x.shape[2]))


class SpatialTransformer(nn.Module):
    """Transformer blocks, `depth` in number, with attention to the tokens, around a skip (LDM, 3.3).
    Source: Rombach et al. (2022). Channels are a multiple of num_heads."""

    def __init__(
        self, channels: int, *, num_heads: int, context_dim: int, depth: int = 1, norm_groups: int | None = None
    ) -> None:
        super().__init__()
        self.norm = GroupNorm(channels, norm_groups=norm_groups, eps=1e-6)
        self.proj_in = nn.Conv2d(channels, channels, 1)
        self.blocks = nn.ModuleList(
            [ContextBlock(channels, num_heads=num_heads, context_dim=context_dim) for _ in range(depth)]
        )
        self.proj_out = zeroed(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor, context: Context) -> Tensor:  # (B, C, H, W) -> (B, C, H, W)
        h = rearrange(self.proj_in(self.norm(x)), "b c h w -> b (h w) c")
        for block in self.blocks:
            h = block(h, context)
        return x + self.proj_out(rearrange(h, "b (h w) c -> b c h w", h=x.shape[2]))


class ContextBlock(nn.Module):
    """Self-attention, attention to tokens and gated feed-forward, pre-norm with residuals, (B, N, C)."""

    def __init__(self, dim: int, *, num_heads: int, context_dim: int) -> None:
        super().__init__()
        self.norm_1 = nn.LayerNorm(dim)
        self.self_attention = CrossAttention(dim, num_heads=num_heads, context_dim=dim)
        self.norm_2 = nn.LayerNorm(dim)
        self.cross_attention = CrossAttention(dim, num_heads=num_heads, context_dim=context_dim)
        self.norm_3 = nn.LayerNorm(dim)
        self.expand = nn.Linear(dim, 8 * dim)  # values and gates
        self.contract = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        h = self.norm_1(x)
        x = x + self.self_attention(h, h)
        x = x + self.cross_attention(self.norm_2(x), context.states, context=context)
        value, gate = self.expand(self.norm_3(x)).chunk(2, dim=-1)
        return x + self.contract(value * F.gelu(gate))  # GEGLU (Shazeer, 2020)


class CrossAttention(nn.Module):
    """Multi-head attention of x (B, N, C) to tokens (B, L, E); only the last projection has a bias.
    With a context, attention is to the visible tokens alone, and patches are placed by rotary positions."""

    def __init__(self, dim: int, *, num_heads: int, context_dim: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim, bias=False)
        self.kv = nn.Linear(context_dim, 2 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, tokens: Tensor, *, context: Context | None = None) -> Tensor:  # (B, N, C)
        q = rearrange(self.q(x), "b n (heads d) -> b heads n d", heads=self.num_heads)
        k, v = rearrange(self.kv(tokens), "b l (two heads d) -> two b heads l d", two=2, heads=self.num_heads)
        if context is not None and context.grid:
            here, there = rotations(context, positions=q.shape[2], head_dim=q.shape[3])
            q, k = rotate(q, here), rotate(k, there)
        mask = None if context is None else context.visible[:, None, None]
        return self.proj(rearrange(attend(q, k, v, mask=mask), "b heads n d -> b n (heads d)"))


def rotations(context: Context, *, positions: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """Rotations of N positions of a square image, (N, d / 2, 2), and of all tokens, (L, d / 2, 2).
    A patch lies in the middle of its pixels; other tokens lie nowhere and are not turned."""
    side, grid, device = math.isqrt(positions), context.grid, context.states.device
    here = grid_rotation(side, side, head_dim=head_dim, theta=THETA, pitch=grid / side, device=device)
    patches = grid_rotation(grid, grid, head_dim=head_dim, theta=THETA, device=device)
    others = context.states.shape[1] - grid * grid
    return here, torch.cat([patches[:1].expand(others, -1, -1), patches])
