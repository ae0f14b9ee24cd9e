"""Blocks of the diffusion U-Net, the paths down and up, and attention of an image to tokens.

Attention is that of GLIDE, or the spatial transformer of latent diffusion. Where the tokens are patches of an image,
rotary positions give each query the places of the patches.

Shapes: B batch, C channels, H W height and width, D size of the embedding, N = H * W places, L tokens, E features."""

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from components.models.conditioned import Context
from components.models.devices import autocast
from components.models.layers import GroupNorm, NetworkBlock, attend, grid_rotation, rotate, zeroed

THETA = 100.0  # grids of patches are small: with 10,000 most frequencies would be the same everywhere


class TextAttention2d(nn.Module):
    """Residual attention to all positions and to the tokens in a joint softmax (Nichol et al., 2022)."""

    def __init__(
        self, channels: int, *, num_heads: int, context_dim: int, norm_groups: int | None = None, eps: float = 1e-5
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = GroupNorm(channels, norm_groups=norm_groups, eps=eps)
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
        k, v = torch.cat([context_k, k], dim=2), torch.cat([context_v, v], dim=2)  # (B, heads, L + N, d)
        q, k = placed(q, k, context)
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
        q, k = (q, k) if context is None else placed(q, k, context)
        mask = None if context is None else context.visible[:, None, None]
        return self.proj(rearrange(attend(q, k, v, mask=mask), "b heads n d -> b n (heads d)"))


def placed(q: Tensor, k: Tensor, context: Context) -> tuple[Tensor, Tensor]:
    """Queries and keys of attention, turned by their places where the tokens are patches.
    Queries (B, heads, N, d) are of a square image, keys of the tokens, and of the image after them if there are more.
    To meet tokens that lie nowhere, queries have their d features twice, turned and as they are, and keys have zeros in
    one half."""
    if not context.grid:
        return q, k
    here, there = rotations(context, positions=q.shape[2], head_dim=q.shape[3])
    turned = rotate(q, here), rotate(k, torch.cat([there, here])[: k.shape[2]])
    others = context.states.shape[1] - context.grid**2
    if not context.nowhere or not others:
        return turned
    somewhere = (torch.arange(k.shape[2], device=k.device) >= others)[:, None]
    keys = torch.cat([turned[1] * somewhere, k * ~somewhere], dim=-1)
    return torch.cat([turned[0], q], dim=-1) * math.sqrt(2), keys  # attention divides by sqrt(2 d)


def rotations(context: Context, *, positions: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """Rotations of N positions of a square image, (N, d / 2, 2), and of all tokens, (L, d / 2, 2).
    A patch lies in the middle of its pixels; other tokens are not turned, nor is the first patch."""
    side, grid, device = math.isqrt(positions), context.grid, context.states.device
    here = grid_rotation(side, side, head_dim=head_dim, theta=THETA, pitch=grid / side, device=device)
    patches = grid_rotation(grid, grid, head_dim=head_dim, theta=THETA, device=device)
    others = context.states.shape[1] - grid * grid
    return here, torch.cat([patches[:1].expand(others, -1, -1), patches])


Resample = Literal["down", "up"]


class Level(NamedTuple):
    """A resolution of the U-Net: the channels of the feature maps, and the presence of attention."""

    channels: int
    attention: bool


class TimedResBlock(nn.Module):
    """Two convolutions with the embedding between, around a skip; resampling comes first.
    Source: Dhariwal and Nichol (2021), section 3 and appendix A; time by addition, Ho et al. (2020), appendix B; with
    `plus_plus` the sum is divided by sqrt(2), and a skip that is resampled is projected too (Song et al., 2021)."""

    in_fp32 = ("embedding_projection",)  # under autocast too

    def __init__(
        self,
        channels: int,
        out_channels: int,
        *,
        embedding_dim: int,
        dropout: float,
        scale_shift_norm: bool,
        norm_groups: int | None = None,
        eps: float = 1e-5,
        resample: Resample | None = None,
        plus_plus: bool = False,
    ) -> None:
        super().__init__()
        self.scale_shift_norm, self.resample, self.plus_plus = scale_shift_norm, resample, plus_plus
        self.norm_1 = GroupNorm(channels, norm_groups=norm_groups, eps=eps)
        self.conv_1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.embedding_projection = nn.Linear(embedding_dim, out_channels * (2 if scale_shift_norm else 1))
        self.norm_2 = GroupNorm(out_channels, norm_groups=norm_groups, eps=eps)
        self.dropout = nn.Dropout(dropout)
        self.conv_2 = zeroed(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        same = channels == out_channels and not (plus_plus and resample)
        self.skip = nn.Identity() if same else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:  # (B, C, H, W), (B, D) after SiLU
        h = F.silu(self.norm_1(x))
        if self.resample is not None:
            h, x = resampled(h, self.resample), resampled(x, self.resample)
        h = self.conv_1(h)
        with autocast(x.device, enabled=False):  # of the time, as in `embedded_time`
            embedding = self.embedding_projection(embedding)[:, :, None, None].to(h.dtype)
        if self.scale_shift_norm:
            scale, shift = embedding.chunk(2, dim=1)
            h = self.norm_2(h) * (1 + scale) + shift
        else:
            h = self.norm_2(h + embedding)
        x = self.skip(x) + self.conv_2(self.dropout(F.silu(h)))
        return x * math.sqrt(0.5) if self.plus_plus else x


class EndPaddedConv2d(nn.Conv2d):
    """Strided convolution, (B, C, H, W) -> (B, C, H/2, W/2), padded as TensorFlow does: at the end."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, stride=2)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(F.pad(input, (0, 1, 0, 1)))


class Layers(NetworkBlock, nn.ModuleList):
    """Layers in a row; residual blocks also take the embedding, attention also takes the tokens."""

    def forward(self, x: Tensor, embedding: Tensor, context: Context | None = None) -> Tensor:
        for layer in self:
            if isinstance(layer, TimedResBlock):
                x = layer(x, embedding)
            elif isinstance(layer, TextAttention2d | SpatialTransformer):
                x = layer(x, context)
            else:
                x = layer(x)
        return x


def levels_of(
    resolution: int, model_channels: int, channel_mult: Sequence[float], attention_resolutions: Sequence[int]
) -> list[Level]:
    """Channels and attention of each level; a factor may be a fraction, 1/2 in ADM's 512² networks.
    Raises ValueError if the resolution cannot be halved between the levels."""
    if resolution % 2 ** (len(channel_mult) - 1):
        raise ValueError(f"resolution {resolution} cannot be halved {len(channel_mult) - 1} times")
    return [
        Level(int(mult * model_channels), resolution >> level in attention_resolutions)
        for level, mult in enumerate(channel_mult)
    ]


def heads_of(channels: int, *, head_dim: int | None, num_heads: int | None) -> int:
    """Heads by count or by channels; ValueError unless exactly one is given and divides the channels."""
    if (head_dim is None) == (num_heads is None):
        raise ValueError("give either head_dim or num_heads")
    if channels % (head_dim or num_heads or channels):
        raise ValueError(f"{channels} channels are no multiple of head_dim or num_heads {head_dim or num_heads}")
    return num_heads or channels // (head_dim or channels)


class Paths(NamedTuple):
    """Makes the layers of a U-Net down, in the middle and up, of residual blocks and attention."""

    levels: list[Level]
    num_res_blocks: int
    residual: Callable[..., TimedResBlock]  # of channels in and out
    attention: Callable[[int], nn.Module]  # of channels
    resample_in_blocks: bool  # in residual blocks (ADM), or by a strided and an upsampled convolution (DDPM)
    pads_end: bool = False  # of strided convolutions: right and below only
    attends_once: bool = False  # on the way up, after the last block of a level alone

    def down(self, channels: int) -> tuple[nn.ModuleList, list[int]]:
        """The layers of the way down, and the channels of each skip connection, the input's first."""
        path, skips = nn.ModuleList(), [channels]
        for level in self.levels:
            for _ in range(self.num_res_blocks):
                layers: list[nn.Module] = [self.residual(channels, level.channels)]
                channels = level.channels
                path.append(Layers([*layers, self.attention(channels)] if level.attention else layers))
                skips.append(channels)
            if level is not self.levels[-1]:
                path.append(Layers([self.resampler(channels, "down")]))
                skips.append(channels)
        return path, skips

    def middle(self, *, attention: bool = True) -> Layers:
        channels = self.levels[-1].channels
        first, between = self.residual(channels, channels), self.attention(channels) if attention else nn.Identity()
        return Layers([first, between, self.residual(channels, channels)])

    def up(self, skips: list[int]) -> nn.ModuleList:
        """The layers of the way up; each consumes one skip connection, the last made first."""
        path, channels = nn.ModuleList(), self.levels[-1].channels
        for level in reversed(self.levels):
            for block in range(self.num_res_blocks + 1):
                layers: list[nn.Module] = [self.residual(channels + skips.pop(), level.channels)]
                channels = level.channels
                if level.attention and (block == self.num_res_blocks or not self.attends_once):
                    layers.append(self.attention(channels))
                if level is not self.levels[0] and block == self.num_res_blocks:
                    layers.append(self.resampler(channels, "up"))
                path.append(Layers(layers))
        return path

    def resampler(self, channels: int, resample: Resample) -> nn.Module:
        if self.resample_in_blocks:
            return self.residual(channels, channels, resample=resample)
        if resample == "down":
            return EndPaddedConv2d(channels) if self.pads_end else nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        return nn.Sequential(nn.Upsample(scale_factor=2, mode="nearest"), nn.Conv2d(channels, channels, 3, padding=1))


def resampled(x: Tensor, resample: Resample) -> Tensor:
    return F.avg_pool2d(x, 2) if resample == "down" else F.interpolate(x, scale_factor=2, mode="nearest")
