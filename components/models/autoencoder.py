"""Autoencoder of VQ-GAN (Esser et al. 2021, "Taming Transformers", section 3.1).

An encoder and a decoder around several bottlenecks: with codes a tokenizer (VQ-VAE, VQ-GAN, dVAE, FSQ), with a Gaussian
a VAE and the first stage of latent diffusion. With `channels=128, channel_mult=(1, 1, 2, 2, 4)` they are those of the
published ImageNet f16 model.

Shapes: B batch, C channels of a level or of z, H W pixels of a level, D latent_channels, h w latent grid, O channels of
the decoder's output."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from components.models.bottleneck import (
    EMAQuantizer,
    Encoded,
    GaussianBottleneck,
    GumbelQuantizer,
    ScalarQuantizer,
    VectorQuantizer,
)
from components.models.devices import autocast
from components.models.diffusion.corruption import gray
from components.models.layers import GroupNorm, NetworkBlock, SelfAttention2d, zeroed
from components.models.losses.reconstruction import image_of, output_channels

Bottleneck = GaussianBottleneck | GumbelQuantizer | ScalarQuantizer | EMAQuantizer | VectorQuantizer
BOTTLENECKS: dict[str, type[Bottleneck]] = {
    "vq_ema": EMAQuantizer,
    "vq": VectorQuantizer,
    "gumbel": GumbelQuantizer,
    "fsq": ScalarQuantizer,
    "gaussian": GaussianBottleneck,
}


EPS = 1e-6  # of every group norm


class ResBlock(NetworkBlock):
    """Pre-activation residual block, (B, C_in, H, W) -> (B, C_out, H, W).
    It starts as its skip connection, so that encoder and decoder start nearly linear: colors take half the steps."""

    def __init__(self, in_channels: int, *, out_channels: int, norm_groups: int | None = None) -> None:
        super().__init__()
        self.norm_1 = GroupNorm(in_channels, norm_groups=norm_groups, eps=EPS)
        self.conv_1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm_2 = GroupNorm(out_channels, norm_groups=norm_groups, eps=EPS)
        self.conv_2 = zeroed(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.skip = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_1(F.silu(self.norm_1(x)))
        h = self.conv_2(F.silu(self.norm_2(h)))
        return h.add_(self.skip(x))  # in place: the convolution does not need its output again


class Downsample(nn.Module):
    """Strided convolution, (B, C, H, W) -> (B, C, H/2, W/2), padded right and below only, as published."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest neighbor, then a convolution, (B, C, H, W) -> (B, C, 2H, 2W).
    Every output pixel needs 2 x 2 input pixels under sums of the 3 x 3 kernel, so the two together are one transposed
    convolution with a 4 x 4 kernel, which multiplies 2.25 times less."""

    fold: Tensor  # (4, 3)

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        fold = torch.tensor([[0.0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]])  # rows of 3 in each row of 4
        self.register_buffer("fold", fold, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        kernel = torch.einsum("ta,sb,oiab->iots", self.fold, self.fold, self.conv.weight)
        return F.conv_transpose2d(x, kernel, self.conv.bias, stride=2, padding=1)


class Sizes(NamedTuple):
    """Arguments of an `Autoencoder` that its encoder and its decoder share."""

    resolution: int
    channels: int
    channel_mult: Sequence[int]
    num_res_blocks: int
    attention_resolutions: Sequence[int]
    patch_shortcut: bool
    norm_groups: int | None
    image_channels: int

    @property
    def widths(self) -> list[int]:
        """Channels of each level, from pixels to features."""
        return [self.channels * mult for mult in self.channel_mult]

    @property
    def factor(self) -> int:
        """Pixels on a side of a position of the latent grid."""
        return 2 ** (len(self.channel_mult) - 1)

    def attention(self, channels: int) -> SelfAttention2d:
        return SelfAttention2d(channels, num_heads=1, norm_groups=self.norm_groups, eps=EPS)

    def level(self, in_channels: int, out_channels: int, *, index: int, num_blocks: int) -> list[nn.Module]:
        """Residual blocks of a level, with attention after each if its resolution has attention."""
        layers: list[nn.Module] = []
        for before in [in_channels, *[out_channels] * (num_blocks - 1)]:
            layers.append(ResBlock(before, out_channels=out_channels, norm_groups=self.norm_groups))
            if self.resolution >> index in self.attention_resolutions:
                layers.append(self.attention(out_channels))
        return layers

    def middle(self, channels: int) -> nn.Sequential:
        blocks = partial(ResBlock, channels, out_channels=channels, norm_groups=self.norm_groups)
        return nn.Sequential(blocks(), self.attention(channels), blocks())


class Encoder(nn.Module):
    """Image (B, 3, H, W) -> features (B, out_channels, h, w), out_channels D or for a Gaussian 2D.
    With `patch_shortcut` a linear map of each patch is added, and the encoder starts as that map alone."""

    def __init__(self, sizes: Sizes, *, out_channels: int) -> None:
        super().__init__()
        widths = sizes.widths
        self.conv_in = nn.Conv2d(sizes.image_channels, sizes.channels, 3, padding=1)
        self.levels = nn.ModuleList()
        for i, (c_in, c_out) in enumerate(zip([sizes.channels, *widths], widths, strict=False)):
            level = sizes.level(c_in, c_out, index=i, num_blocks=sizes.num_res_blocks)
            last = i == len(widths) - 1
            self.levels.append(nn.Sequential(*level, *([] if last else [Downsample(c_out)])))
        self.middle = sizes.middle(widths[-1])
        self.norm_out = GroupNorm(widths[-1], norm_groups=sizes.norm_groups, eps=EPS)
        self.conv_out = nn.Conv2d(widths[-1], out_channels, 3, padding=1)
        self.shortcut: nn.Module | None = None
        if sizes.patch_shortcut:
            self.shortcut = nn.Conv2d(sizes.image_channels, out_channels, sizes.factor, stride=sizes.factor, bias=False)
            zeroed(self.conv_out)

    def forward(self, image: Tensor) -> Tensor:
        h = self.conv_in(image)
        for level in self.levels:
            h = level(h)
        features = self.conv_out(F.silu(self.norm_out(self.middle(h))))
        return features if self.shortcut is None else features + self.shortcut(image)


class Decoder(nn.Module):
    """Features (B, D, h, w) -> output (B, O, H, W) fp32, with a block more a level than the encoder.
    With `patch_shortcut` a color of each feature is added, blended between positions, and the decoder starts so."""

    def __init__(self, sizes: Sizes, *, latent_channels: int, out_channels: int) -> None:
        super().__init__()
        widths = sizes.widths[::-1]
        self.conv_in = nn.Conv2d(latent_channels, widths[0], 3, padding=1)
        self.middle = sizes.middle(widths[0])
        self.levels = nn.ModuleList()
        for i, (c_in, c_out) in enumerate(zip([widths[0], *widths], widths, strict=False)):
            index = len(widths) - 1 - i
            level = sizes.level(c_in, c_out, index=index, num_blocks=sizes.num_res_blocks + 1)
            self.levels.append(nn.Sequential(*level, *([] if index == 0 else [Upsample(c_out)])))
        self.norm_out = GroupNorm(widths[-1], norm_groups=sizes.norm_groups, eps=EPS)
        self.conv_out = nn.Conv2d(widths[-1], out_channels, 3, padding=1)
        self.shortcut: nn.Module | None = None
        if sizes.patch_shortcut:
            color = nn.Conv2d(latent_channels, out_channels, 1, bias=False)
            self.shortcut = nn.Sequential(color, nn.Upsample(scale_factor=sizes.factor, mode="bilinear"))
            zeroed(self.conv_out)

    def forward(self, features: Tensor) -> Tensor:
        h = self.middle(self.conv_in(features))
        for level in self.levels:
            h = level(h)
        with autocast(h.device, enabled=False):  # as in the U-Net: a bf16 rounding is half a gray level
            dtype = self.conv_out.weight.dtype
            output = self.conv_out(F.silu(self.norm_out(h.to(dtype))))
            return output if self.shortcut is None else output + self.shortcut(features.to(dtype))


class Autoencoder(nn.Module):
    """Encoder, bottleneck and decoder, a 1x1 projection on each side of the bottleneck.

    Args:
        resolution: pixels on a side of the images; a multiple of 2 ** (len(channel_mult) - 1).
        channels: width of the first level.
        channel_mult: width of each level in units of `channels`; each level but the last halves the resolution.
        num_res_blocks: residual blocks a level of the encoder; the decoder has one more.
        attention_resolutions: resolutions, in pixels, with attention after each block; the middle always has it.
        latent_channels: width of the encoder's and decoder's end; a Gaussian's encoder has twice that.
        bottleneck: see `make_bottleneck`.
        reconstruction: what the decoder's output means, see `components.models.losses.reconstruction`.
        patch_shortcut: a linear map around the encoder and one around the decoder (residual autoencoding, Chen et al.,
            2024, section 3.1, with a learned map): colors are learned in minutes. The published networks have none.
        norm_groups: of every group norm; see `groups_of`.
        decoder_attention_resolutions: of the decoder; None: as the encoder's. Those of MAR's KL-16 differ.
        projections: the 1x1 projections; the first stages of Stable Diffusion 3 and FLUX have none.
        latent_shift: subtracted from the latents of latent diffusion (`shift_factor` of those first stages).
        image_channels: 3; 1 for gray images, to which colors are turned; or, for `classes`, the number of a map's.
        shared_scale: all values of an image have one scale of the likelihood (Rybkin et al., 2021, "Simple and
            Effective VAE Training with Calibrated Decoders", where all images share one). A scale of its own grows
            where colors are hard to tell, and leaves them little gradient.

    Raises ValueError for sizes that don't fit each other, or an unknown bottleneck."""

    def __init__(
        self,
        *,
        resolution: int,
        channels: int,
        channel_mult: Sequence[int],
        num_res_blocks: int,
        attention_resolutions: Sequence[int],
        latent_channels: int,
        bottleneck: Mapping[str, Any],
        reconstruction: str = "l1",
        patch_shortcut: bool = False,
        norm_groups: int | None = None,
        decoder_attention_resolutions: Sequence[int] | None = None,
        projections: bool = True,
        latent_shift: float = 0.0,
        image_channels: int = 3,
        shared_scale: bool = False,
    ) -> None:
        super().__init__()
        shared = (patch_shortcut, norm_groups, image_channels)
        sizes = Sizes(resolution, channels, channel_mult, num_res_blocks, attention_resolutions, *shared)
        if resolution % (factor := sizes.factor):
            raise ValueError(f"resolution {resolution} is not a multiple of {factor}, the factor of {channel_mult=}")
        self.resolution, self.reconstruction = resolution, reconstruction
        self.latent_shift, self.image_channels, self.shared_scale = latent_shift, image_channels, shared_scale
        self.grid = (resolution // factor, resolution // factor)
        width = 2 * latent_channels if bottleneck["kind"] == "gaussian" else latent_channels
        self.encoder = Encoder(sizes, out_channels=width)
        out_channels = output_channels(kind=reconstruction, channels=image_channels)
        if decoder_attention_resolutions is not None:
            sizes = sizes._replace(attention_resolutions=decoder_attention_resolutions)
        self.decoder = Decoder(sizes, latent_channels=latent_channels, out_channels=out_channels)
        self.bottleneck = make_bottleneck(**bottleneck, latent_channels=latent_channels)
        self.is_gaussian = isinstance(self.bottleneck, GaussianBottleneck)
        self.latent_shape = (self.bottleneck.channels, *self.grid)  # of z
        diffused = self.bottleneck.channels if self.is_gaussian else self.bottleneck.in_channels
        self.diffused_shape = (diffused, *self.grid)  # of `to_latents`
        if not projections and (width, latent_channels) != (self.bottleneck.in_channels, self.bottleneck.channels):
            raise ValueError(f"latent_channels {latent_channels} without projections are not those of the bottleneck")
        project = partial(nn.Conv2d, kernel_size=1) if projections else nn.Identity
        self.project_in = project(width, self.bottleneck.in_channels)
        self.project_out = project(self.bottleneck.channels, latent_channels)

    @property
    def codebook_size(self) -> int:
        """Number of codes. Raises ValueError for a Gaussian bottleneck, a kind without codes."""
        return self._codes().codebook_size

    @property
    def map_classes(self) -> int:
        """Number of classes of the maps that it reads; 0: it reads images."""
        return self.image_channels if self.reconstruction == "classes" or self.image_channels > 3 else 0

    @property
    def last_layer(self) -> Tensor:
        """Weight (O, C, 3, 3) of the decoder's last convolution, for the adversarial loss's weight."""
        return self.decoder.conv_out.weight

    def encode(self, image: Tensor, **draws: Tensor | float) -> Encoded:
        """Encode an image (B, 3, H, W) in [-1, 1] to z (B, C, h, w), losses and indices.
        `draws` are noise and temperature of a random bottleneck; without draws the encoding is deterministic."""
        return self.bottleneck(self.features(image), **draws)

    def features(self, image: Tensor) -> Tensor:
        """The bottleneck's input (B, C or 2 C, h, w) of an image."""
        return self.project_in(self.encoder(self.planes(image)))

    def planes(self, image: Tensor) -> Tensor:
        """An image (B, 3, H, W) in [-1, 1] as the encoder takes it, (B, image_channels, H, W).
        The gray of class v among n is 2 v / (n - 1) - 1, as in masks of a set; its plane is one there, else zero."""
        if image.shape[1] == self.image_channels and self.reconstruction != "classes":
            return image
        if self.image_channels == 1:
            return gray(image)[:, :1]
        share = (image[:, 0] + 1) / 2
        classes = (share * (self.image_channels - 1)).round().long()
        planes = F.one_hot(classes, self.image_channels)
        return planes.movedim(3, 1).to(image.dtype)

    def decode_raw(self, z: Tensor) -> Tensor:
        """Decode z (B, C, h, w) to the input of `reconstruction_loss`, (B, O, H, W)."""
        output = self.decoder(self.project_out(z))
        if not self.shared_scale:
            return output
        location, log_scale = output.chunk(2, dim=1)
        shared = log_scale.mean(dim=(1, 2, 3), keepdim=True)
        return torch.cat([location, shared.expand_as(location)], dim=1)

    def decode(self, z: Tensor) -> Tensor:
        """z (B, C, h, w) -> image (B, 3, H, W), near [-1, 1] and not clipped."""
        return image_of(self.decode_raw(z), kind=self.reconstruction)

    def forward(self, image: Tensor, **draws: Tensor | float) -> tuple[Tensor, Encoded]:
        """Image (B, 3, H, W) in [-1, 1] -> raw output (B, O, H, W) and the bottleneck's result."""
        encoded = self.encode(image, **draws)
        return self.decode_raw(encoded.z), encoded

    @torch.no_grad()
    def to_latents(self, image: Tensor) -> Tensor:
        """Image (B, 3, H, W) in [-1, 1] -> latents (B, C, h, w), the space of latent diffusion.
        The latents are the mean of a Gaussian, or the features before quantization, a step then left to `from_latents`
        (Rombach et al., 2022, section 3.1)."""
        features = self.features(image)
        latents = self.bottleneck(features).z if self.is_gaussian else features
        return latents - self.latent_shift if self.latent_shift else latents

    @torch.no_grad()
    def from_latents(self, latents: Tensor) -> Tensor:
        """The way back: (B, C, h, w) -> image (B, 3, H, W), near [-1, 1] and not clipped."""
        latents = latents + self.latent_shift if self.latent_shift else latents
        return self.decode(latents if self.is_gaussian else self.bottleneck(latents).z)

    @torch.no_grad()
    def reconstruct(self, image: Tensor) -> Tensor:
        """Image (B, 3, H, W) in [-1, 1] through hard codes or a Gaussian's mean and back, not clipped."""
        return self.decode(self.encode(image).z)

    @torch.no_grad()
    def tokenize(self, image: Tensor) -> Tensor:
        """Image (B, 3, H, W) in [-1, 1] -> indices (B, h, w) int64. Raises ValueError for a Gaussian."""
        self._codes()
        indices = self.encode(image).indices
        assert indices is not None
        return indices

    def lookup(self, indices: Tensor) -> Tensor:
        """Indices (B, h, w) int64 -> z (B, C, h, w). Raises ValueError for a Gaussian."""
        return self._codes().lookup(indices)

    @torch.no_grad()
    def detokenize(self, indices: Tensor) -> Tensor:
        """Indices (B, h, w) int64 -> image (B, 3, H, W), near [-1, 1] and not clipped."""
        return self.decode(self.lookup(indices))

    def _codes(self) -> GumbelQuantizer | ScalarQuantizer | EMAQuantizer | VectorQuantizer:
        if isinstance(self.bottleneck, GaussianBottleneck):
            raise ValueError("an autoencoder with a Gaussian bottleneck has no tokens; take one with a codebook")
        return self.bottleneck


def make_bottleneck(*, kind: str, latent_channels: int, **own: Any) -> Bottleneck:
    """The bottleneck of a kind of BOTTLENECKS; `own` are arguments of the bottleneck's class.
    A codebook_dim of None stands for latent_channels. Raises ValueError if the kind is unknown."""
    if kind not in BOTTLENECKS:
        raise ValueError(f"unknown bottleneck {kind!r}: choose {', '.join(BOTTLENECKS)}")
    if kind == "gaussian":
        return GaussianBottleneck(channels=latent_channels)
    if "codebook_size" in own:
        own["codebook_dim"] = own.get("codebook_dim") or latent_channels
    return BOTTLENECKS[kind](**own)
