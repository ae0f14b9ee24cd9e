"""Diffusion U-Net of ADM (Dhariwal and Nichol, 2021), which contains those of DDPM (Ho et al., 2020) and IDDPM.

Shapes: B batch, C channels, H W height and width, D = 4 * model_channels size of the embedding.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from components.models.layers import GroupNorm, SelfAttention2d, timestep_embedding, zeroed
from components.models.text import TextTransformer

Resample = Literal["down", "up"]


class Level(NamedTuple):
    channels: int
    attention: bool


class UNet(nn.Module):
    """Predict noise, x_0 or v from x_t, given the timestep and any of: a label, a text, a low-resolution image.

    Args:
        resolution: H = W of x_t; divisible by 2 ** (len(channel_mult) - 1).
        model_channels: a multiple of 4; channel_mult multiplies it for each level.
        num_res_blocks: residual blocks of each level on the way down; one more on the way up.
        attention_resolutions: in pixels; the middle always has attention.
        head_dim: channels of one attention head; give either this or num_heads.
        num_classes: adds a class table with one more row, the null label `num_classes`.
        text: arguments of a TextTransformer whose pooled output joins the time embedding.
        low_res: concatenates a low-resolution image to x_t and embeds its noise level.
        scale_shift_norm: adaptive group norm; otherwise the embedding is added to the features.
        resample_in_blocks: resampling inside residual blocks; otherwise a strided and an upsampled convolution.

    Raises:
        ValueError: sizes that do not fit each other.
    """

    def __init__(
        self,
        *,
        resolution: int,
        model_channels: int,
        channel_mult: Sequence[int],
        num_res_blocks: int,
        attention_resolutions: Sequence[int],
        head_dim: int | None = None,
        num_heads: int | None = None,
        dropout: float = 0.0,
        num_classes: int | None = None,
        text: dict[str, Any] | None = None,
        low_res: bool = False,
        scale_shift_norm: bool = True,
        resample_in_blocks: bool = True,
        in_channels: int = 3,
        out_channels: int = 3,
    ) -> None:
        super().__init__()
        check_sizes(resolution, channel_mult, head_dim, num_heads)
        self.resolution, self.model_channels, self.num_classes = resolution, model_channels, num_classes
        embedding_dim = 4 * model_channels
        self.time_mlp = embedding_mlp(model_channels, embedding_dim)
        self.class_embedding = None if num_classes is None else nn.Embedding(num_classes + 1, embedding_dim)
        self.text_encoder = None if text is None else TextTransformer(**text)
        self.text_projection = None if text is None else nn.Linear(text["model_dim"], embedding_dim)
        self.noise_level_mlp = embedding_mlp(model_channels, embedding_dim) if low_res else None

        residual = partial(ResBlock, embedding_dim=embedding_dim, dropout=dropout, scale_shift_norm=scale_shift_norm)
        resampler = partial(residual_resampler, residual) if resample_in_blocks else conv_resampler

        def attention(channels: int) -> SelfAttention2d:
            return SelfAttention2d(channels, num_heads=num_heads or channels // (head_dim or channels))

        levels = [
            Level(mult * model_channels, resolution >> level in attention_resolutions)
            for level, mult in enumerate(channel_mult)
        ]
        self.conv_in = nn.Conv2d(in_channels * (2 if low_res else 1), model_channels, 3, padding=1)
        self.down, skips = down_path(levels, model_channels, num_res_blocks, residual, attention, resampler)
        channels = levels[-1].channels
        self.middle = Layers([residual(channels, channels), attention(channels), residual(channels, channels)])
        self.up = up_path(levels, skips, num_res_blocks, residual, attention, resampler)
        self.norm_out = GroupNorm(levels[0].channels)
        self.conv_out = zeroed(nn.Conv2d(levels[0].channels, out_channels, 3, padding=1))
        # Convolutions then keep their maps so, which is up to twice as fast.
        self.to(memory_format=torch.channels_last)  # pyrefly: ignore[no-matching-overload]

    def forward(
        self,
        x_t: Tensor,
        timesteps: Tensor,
        *,
        label: Tensor | None = None,
        text: Tensor | None = None,
        low_res: Tensor | None = None,
        noise_level: Tensor | None = None,
    ) -> Tensor:
        """Return the prediction (B, out_channels, H, W), float32 under autocast too.

        Args:
            x_t: (B, in_channels, H, W).
            timesteps: (B,) original indices, int64.
            label: (B,) int64 in [0, num_classes]; num_classes is the null label.
            text: (B, L) int64 BPE ids, padding 0.
            low_res: (B, in_channels, H, W), enlarged to x_t's size and noised to noise_level.
            noise_level: (B,) int64, noising steps that low_res went through.

        Raises:
            ValueError: a condition is missing, or is one that the network was not built for.
        """
        self.check_conditions(label, text, low_res, noise_level)
        embedding = F.silu(self.embed(timesteps, label, text, noise_level))  # (B, D)
        h = self.conv_in(x_t if low_res is None else torch.cat([x_t, low_res], dim=1))
        skips = [h]
        for layers in self.down:
            h = layers(h, embedding)
            skips.append(h)
        h = self.middle(h, embedding)
        for layers in self.up:
            h = layers(torch.cat([h, skips.pop()], dim=1), embedding)
        with torch.autocast(x_t.device.type, enabled=False):  # a bf16 rounding here would be noise in the prediction
            return self.conv_out(F.silu(self.norm_out(h.float())))

    def embed(
        self, timesteps: Tensor, label: Tensor | None, text: Tensor | None, noise_level: Tensor | None
    ) -> Tensor:  # (B, D)
        """Sum the embeddings of the timestep and of every condition but the low-resolution image itself."""
        embedding = self.time_mlp(timestep_embedding(timesteps, self.model_channels))
        if self.class_embedding is not None:
            embedding = embedding + self.class_embedding(label)
        if self.text_encoder is not None and self.text_projection is not None:
            embedding = embedding + self.text_projection(self.text_encoder(text).pooled)
        if self.noise_level_mlp is not None and noise_level is not None:
            embedding = embedding + self.noise_level_mlp(timestep_embedding(noise_level, self.model_channels))
        return embedding

    def check_conditions(
        self, label: Tensor | None, text: Tensor | None, low_res: Tensor | None, noise_level: Tensor | None
    ) -> None:
        wanted = {
            "label": (label, self.class_embedding),
            "text": (text, self.text_encoder),
            "low_res": (low_res, self.noise_level_mlp),
            "noise_level": (noise_level, self.noise_level_mlp),
        }
        for name, (value, module) in wanted.items():
            if (value is None) != (module is None):
                raise ValueError(f"this network {'is not' if module is None else 'is'} conditioned on {name}")


class ResBlock(nn.Module):
    """Two convolutions with the embedding between them, around a skip; resampling comes before the first one.

    Source: Dhariwal and Nichol (2021), section 3 and appendix A; time by addition, Ho et al. (2020), appendix B.
    """

    def __init__(
        self,
        channels: int,
        out_channels: int,
        *,
        embedding_dim: int,
        dropout: float,
        scale_shift_norm: bool,
        resample: Resample | None = None,
    ) -> None:
        super().__init__()
        self.scale_shift_norm = scale_shift_norm
        self.resample = resample
        self.norm_1 = GroupNorm(channels)
        self.conv_1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.embedding_projection = nn.Linear(embedding_dim, out_channels * (2 if scale_shift_norm else 1))
        self.norm_2 = GroupNorm(out_channels)
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


class Layers(nn.ModuleList):
    """Layers in a row, of which the residual blocks also take the embedding."""

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        for layer in self:
            x = layer(x, embedding) if isinstance(layer, ResBlock) else layer(x)
        return x


Residual = Callable[..., ResBlock]
Attention = Callable[[int], SelfAttention2d]
Resampler = Callable[[int, Resample], nn.Module]


def down_path(
    levels: list[Level],
    channels: int,
    num_res_blocks: int,
    residual: Residual,
    attention: Attention,
    resampler: Resampler,
) -> tuple[nn.ModuleList, list[int]]:
    """The layers of the way down, and the channels of each skip connection, the input's first."""
    path, skips = nn.ModuleList(), [channels]
    for level in levels:
        for _ in range(num_res_blocks):
            layers: list[nn.Module] = [residual(channels, level.channels)]
            channels = level.channels
            path.append(Layers([*layers, attention(channels)] if level.attention else layers))
            skips.append(channels)
        if level is not levels[-1]:
            path.append(Layers([resampler(channels, "down")]))
            skips.append(channels)
    return path, skips


def up_path(
    levels: list[Level],
    skips: list[int],
    num_res_blocks: int,
    residual: Residual,
    attention: Attention,
    resampler: Resampler,
) -> nn.ModuleList:
    """The layers of the way up; each consumes one skip connection, the last made first."""
    path, skips, channels = nn.ModuleList(), list(skips), levels[-1].channels
    for level in reversed(levels):
        for block in range(num_res_blocks + 1):
            layers: list[nn.Module] = [residual(channels + skips.pop(), level.channels)]
            channels = level.channels
            if level.attention:
                layers.append(attention(channels))
            if level is not levels[0] and block == num_res_blocks:
                layers.append(resampler(channels, "up"))
            path.append(Layers(layers))
    return path


def residual_resampler(residual: Residual, channels: int, resample: Resample) -> nn.Module:
    return residual(channels, channels, resample=resample)


def conv_resampler(channels: int, resample: Resample) -> nn.Module:
    if resample == "down":
        return nn.Conv2d(channels, channels, 3, stride=2, padding=1)
    return nn.Sequential(nn.Upsample(scale_factor=2, mode="nearest"), nn.Conv2d(channels, channels, 3, padding=1))


def resampled(x: Tensor, resample: Resample) -> Tensor:
    return F.avg_pool2d(x, 2) if resample == "down" else F.interpolate(x, scale_factor=2, mode="nearest")


def embedding_mlp(dim: int, embedding_dim: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(dim, embedding_dim), nn.SiLU(), nn.Linear(embedding_dim, embedding_dim))


def check_sizes(resolution: int, channel_mult: Sequence[int], head_dim: int | None, num_heads: int | None) -> None:
    if resolution % 2 ** (len(channel_mult) - 1):
        raise ValueError(f"resolution {resolution} cannot be halved {len(channel_mult) - 1} times")
    if (head_dim is None) == (num_heads is None):
        raise ValueError("give either head_dim or num_heads")
