"""Blocks of the diffusion U-Net, and the paths down and up.
Shapes: B batch, C channels, H W height and width, D size of the embedding."""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from components.models.conditioned import Context
from components.models.cross_attention import SpatialTransformer, TextAttention2d
from components.models.layers import GroupNorm, NetworkBlock, zeroed

Resample = Literal["down", "up"]


class Level(NamedTuple):
    """A resolution of the U-Net: the channels of the feature maps, and the presence of attention."""

    channels: int
    attention: bool


class TimedResBlock(nn.Module):
    """Two convolutions with the embedding between, around a skip; resampling comes first.
    Source: Dhariwal and Nichol (2021), section 3 and appendix A; time by addition, Ho et al. (2020), appendix B."""

    def __init__(
        self,
        channels: int,
        out_channels: int,
        *,
        embedding_dim: int,
        dropout: float,
        scale_shift_norm: bool,
        norm_groups: int | None = None,
        resample: Resample | None = None,
    ) -> None:
        super().__init__()
        self.scale_shift_norm, self.resample = scale_shift_norm, resample
        self.norm_1 = GroupNorm(channels, norm_groups=norm_groups)
        self.conv_1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.embedding_projection = nn.Linear(embedding_dim, out_channels * (2 if scale_shift_norm else 1))
        self.norm_2 = GroupNorm(out_channels, norm_groups=norm_groups)
        self.dropout = nn.Dropout(dropout)
        self.conv_2 = zeroed(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.skip = nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:  # (B, C, H, W), (B, D) after SiLU
        h = F.silu(self.norm_1(x))
        if self.resample is not None:
            h, x = resampled(h, self.resample), resampled(x, self.resample)
        h = self.conv_1(h)
        embedding = self.embedding_projection(embedding)[:, :, None, None]
        if self.scale_shift_norm:
            scale, shift = embedding.chunk(2, dim=1)
            h = self.norm_2(h) * (1 + scale) + shift
        else:
            h = self.norm_2(h + embedding)
        return self.skip(x) + self.conv_2(self.dropout(F.silu(h)))


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

    def down(self) -> tuple[nn.ModuleList, list[int]]:
        """The layers of the way down, and the channels of each skip connection, the input's first."""
        channels = self.levels[0].channels
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
                if level.attention:
                    layers.append(self.attention(channels))
                if level is not self.levels[0] and block == self.num_res_blocks:
                    layers.append(self.resampler(channels, "up"))
                path.append(Layers(layers))
        return path

    def resampler(self, channels: int, resample: Resample) -> nn.Module:
        if self.resample_in_blocks:
            return self.residual(channels, channels, resample=resample)
        if resample == "down":
            return nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        return nn.Sequential(nn.Upsample(scale_factor=2, mode="nearest"), nn.Conv2d(channels, channels, 3, padding=1))


def resampled(x: Tensor, resample: Resample) -> Tensor:
    return F.avg_pool2d(x, 2) if resample == "down" else F.interpolate(x, scale_factor=2, mode="nearest")
