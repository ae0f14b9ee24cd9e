"""VQ-GAN autoencoder (Esser et al. 2021, "Taming Transformers for High-Resolution Image Synthesis", section 3.1).

With `channels=128, channel_mult=(1, 1, 2, 2, 4)` the encoder and decoder are those of the published ImageNet f16 model.

Shapes: B batch, C channels of a level, H W pixels of a level, D latent_channels, h w latent grid.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from components.models.layers import GroupNorm, SelfAttention2d
from components.models.quantizer import EMAQuantizer, Quantized


def _group_norm(channels: int) -> GroupNorm:
    return GroupNorm(channels, eps=1e-6)


def _attention(channels: int) -> SelfAttention2d:
    return SelfAttention2d(channels, num_heads=1, eps=1e-6)


class ResBlock(nn.Module):
    """Pre-activation residual block, (B, C_in, H, W) -> (B, C_out, H, W)."""

    def __init__(self, in_channels: int, *, out_channels: int) -> None:
        super().__init__()
        self.norm_1 = _group_norm(in_channels)
        self.conv_1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm_2 = _group_norm(out_channels)
        self.conv_2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_1(F.silu(self.norm_1(x)))
        h = self.conv_2(F.silu(self.norm_2(h)))
        return h.add_(self.skip(x))  # in place: the convolution does not need its output again


class Downsample(nn.Module):
    """Strided convolution, (B, C, H, W) -> (B, C, H/2, W/2); padded on the right and below only, as published."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest neighbor, then a convolution, (B, C, H, W) -> (B, C, 2H, 2W).

    Nearest neighbor repeats each pixel, so every output pixel needs 2 x 2 input pixels under sums of the 3 x 3 kernel:
    the two together are one transposed convolution with a 4 x 4 kernel, which multiplies 2.25 times less.
    """

    fold: Tensor  # (4, 3)

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        fold = torch.tensor([[0.0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]])  # which rows of 3 each row of 4 adds up
        self.register_buffer("fold", fold, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        kernel = torch.einsum("ta,sb,oiab->iots", self.fold, self.fold, self.conv.weight)
        return F.conv_transpose2d(x, kernel, self.conv.bias, stride=2, padding=1)


def _blocks(in_channels: int, *, out_channels: int, num_blocks: int, attention: bool) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for i in range(num_blocks):
        layers.append(ResBlock(in_channels if i == 0 else out_channels, out_channels=out_channels))
        if attention:
            layers.append(_attention(out_channels))
    return layers


def _middle(channels: int) -> nn.Sequential:
    return nn.Sequential(
        ResBlock(channels, out_channels=channels), _attention(channels), ResBlock(channels, out_channels=channels)
    )


class Encoder(nn.Module):
    """Image (B, 3, H, W) -> z_e (B, D, h, w)."""

    def __init__(
        self,
        *,
        resolution: int,
        channels: int,
        channel_mult: Sequence[int],
        num_res_blocks: int,
        attention_resolutions: Sequence[int],
        latent_channels: int,
    ) -> None:
        super().__init__()
        widths = [channels * mult for mult in channel_mult]
        self.conv_in = nn.Conv2d(3, channels, 3, padding=1)
        self.levels = nn.ModuleList()
        for i, (c_in, c_out) in enumerate(zip([channels, *widths], widths, strict=False)):
            attention = resolution >> i in attention_resolutions
            level = _blocks(c_in, out_channels=c_out, num_blocks=num_res_blocks, attention=attention)
            last = i == len(widths) - 1
            self.levels.append(nn.Sequential(*level, *([] if last else [Downsample(c_out)])))
        self.middle = _middle(widths[-1])
        self.norm_out = _group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], latent_channels, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        h = self.conv_in(image)
        for level in self.levels:
            h = level(h)
        h = self.middle(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class Decoder(nn.Module):
    """z_q (B, D, h, w) -> image (B, 3, H, W); one block more a level than the encoder, as published."""

    def __init__(
        self,
        *,
        resolution: int,
        channels: int,
        channel_mult: Sequence[int],
        num_res_blocks: int,
        attention_resolutions: Sequence[int],
        latent_channels: int,
    ) -> None:
        super().__init__()
        widths = [channels * mult for mult in reversed(channel_mult)]
        self.conv_in = nn.Conv2d(latent_channels, widths[0], 3, padding=1)
        self.middle = _middle(widths[0])
        self.levels = nn.ModuleList()
        for i, (c_in, c_out) in enumerate(zip([widths[0], *widths], widths, strict=False)):
            last = i == len(widths) - 1
            attention = resolution >> (len(widths) - 1 - i) in attention_resolutions
            level = _blocks(c_in, out_channels=c_out, num_blocks=num_res_blocks + 1, attention=attention)
            self.levels.append(nn.Sequential(*level, *([] if last else [Upsample(c_out)])))
        self.norm_out = _group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, z_q: Tensor) -> Tensor:
        h = self.middle(self.conv_in(z_q))
        for level in self.levels:
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class VQAutoencoder(nn.Module):
    """Image tokenizer: encoder, quantizer and decoder.

    Args:
        resolution: pixels on a side of the pictures; a multiple of 2 ** (len(channel_mult) - 1).
        channels: width of the first level.
        channel_mult: width of each level in units of `channels`; each level but the last halves the resolution.
        num_res_blocks: residual blocks a level of the encoder; the decoder has one more.
        attention_resolutions: resolutions, in pixels, with attention after each block; the middle always has it.
        latent_channels: width of z_e and z_q.
        codebook_size, codebook_dim, ema_decay, dead_code_threshold, l2_normalize: see `EMAQuantizer`.

    Raises:
        ValueError: when the resolution cannot be halved that often.
    """

    def __init__(
        self,
        *,
        resolution: int,
        channels: int,
        channel_mult: Sequence[int],
        num_res_blocks: int,
        attention_resolutions: Sequence[int],
        latent_channels: int,
        codebook_size: int,
        codebook_dim: int,
        ema_decay: float = 0.99,
        dead_code_threshold: float = 0.25,
        l2_normalize: bool = True,
    ) -> None:
        super().__init__()
        factor = 2 ** (len(channel_mult) - 1)
        if resolution % factor:
            raise ValueError(f"resolution {resolution} is not a multiple of {factor}, the factor of {channel_mult=}")
        self.grid = (resolution // factor, resolution // factor)
        shape = {
            "resolution": resolution,
            "channels": channels,
            "channel_mult": channel_mult,
            "num_res_blocks": num_res_blocks,
            "attention_resolutions": attention_resolutions,
            "latent_channels": latent_channels,
        }
        self.encoder = Encoder(**shape)
        self.decoder = Decoder(**shape)
        self.quantizer = EMAQuantizer(
            latent_channels=latent_channels,
            codebook_size=codebook_size,
            codebook_dim=codebook_dim,
            ema_decay=ema_decay,
            dead_code_threshold=dead_code_threshold,
            l2_normalize=l2_normalize,
        )

    @property
    def last_layer(self) -> Tensor:
        """Weight (3, C, 3, 3) of the decoder's last convolution, for the adaptive weight of the adversarial loss."""
        return self.decoder.conv_out.weight

    def encode(self, image: Tensor) -> Tensor:
        """Image (B, 3, H, W) in [-1, 1] -> z_e (B, D, h, w)."""
        return self.encoder(image)

    def quantize(self, z_e: Tensor) -> Quantized:
        """z_e (B, D, h, w) -> its codes."""
        return self.quantizer(z_e)

    def decode(self, z_q: Tensor) -> Tensor:
        """z_q (B, D, h, w) -> image (B, 3, H, W), near [-1, 1] and not clipped."""
        return self.decoder(z_q)

    def forward(self, image: Tensor) -> tuple[Tensor, Quantized]:
        """Image (B, 3, H, W) in [-1, 1] -> reconstruction (B, 3, H, W) and its codes."""
        quantized = self.quantize(self.encode(image))
        return self.decode(quantized.z_q), quantized

    @torch.no_grad()
    def tokenize(self, image: Tensor) -> Tensor:
        """Image (B, 3, H, W) in [-1, 1] -> indices (B, h, w) int64."""
        return self.quantize(self.encode(image)).indices

    @torch.no_grad()
    def detokenize(self, indices: Tensor) -> Tensor:
        """Indices (B, h, w) int64 -> image (B, 3, H, W), near [-1, 1] and not clipped."""
        return self.decode(self.quantizer.lookup(indices))
