"""Networks by kind; fields are arguments of the constructor in `components.models.bundle.NETWORKS`."""

import math
from collections.abc import Iterable
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from components.configuration.config import Config, Since, refuse


class NetworkConfig(Config):
    """A network of a given kind; all fields but `kind` are arguments of the constructor."""

    kind: str  # a key of `components.models.bundle.NETWORKS`


class UNetSizes(NetworkConfig):
    """Sizes shared by all U-Nets of diffusion models (Dhariwal and Nichol, 2021)."""

    model_channels: int = Field(ge=4, multiple_of=2)
    channel_mult: tuple[int | float, ...] = Field(min_length=1)  # one level each, halves too
    num_res_blocks: int = Field(1, ge=1)
    attention_resolutions: tuple[int, ...] = ()  # in pixels
    head_dim: int | None = Field(32, ge=1)  # channels of a head; None: by num_heads
    num_heads: int | None = Field(None, ge=1)  # instead of head_dim, which is None then
    dropout: float = Field(0.0, ge=0, lt=1)
    text_conditioning: Literal["pooled", "cross_attention", "spatial_transformer"] = "pooled"
    transformer_depth: int = Field(1, ge=1)  # of spatial transformers
    class_token_dim: int | None = Field(None, ge=1)  # the label is a token, not part of the embedding
    scale_shift_norm: bool = True  # adaptive group norm, or time by addition
    resample_in_blocks: bool = True  # or by convolutions
    norm_groups: int | None = Field(None, ge=1)  # 32 at published sizes; None: so that each keeps four channels
    norm_eps: Annotated[float, Since(1e-5)] = Field(1e-5, gt=0)  # DDPM: 1e-6
    frequency_shift: Annotated[int, Since(0)] = Field(0, ge=0, le=1)  # of the embedding of times; DDPM: 1
    sines_first: Annotated[bool, Since(False)] = False  # in it, as DDPM; or cosines
    pads_end: Annotated[bool, Since(False)] = False  # strided convolutions, as DDPM; or all sides
    plus_plus: Annotated[bool, Since(False)] = False  # DDPM++; or ADM and DDPM

    def _check(self) -> None:
        both = (self.head_dim is None) == (self.num_heads is None)
        refuse(both, "give either head_dim or num_heads; head_dim=None where num_heads is given")
        check_norm_groups(self.norm_groups, self.model_channels, self.channel_mult)
        tokens = self.text_conditioning != "pooled" or self.class_token_dim is not None
        refuse(self.plus_plus and tokens, "plus_plus has no attention to tokens: text_conditioning must be pooled")


class UNetConfig(UNetSizes):
    """U-Net of a diffusion model; a condition image is concatenated to the noisy input."""

    kind: Literal["unet"] = "unet"


class ImageAttentionUNetConfig(UNetSizes):
    """U-Net with attention to the condition image as tokens, a token a patch, by rotary positions."""

    kind: Literal["image_attention_unet"] = "image_attention_unet"
    text_conditioning: Literal["cross_attention", "spatial_transformer"] = "cross_attention"
    image_token_dim: int = Field(64, ge=1)  # same as the text's, where the model has both
    image_patch_size: int = Field(4, ge=1)  # pixels

    @property
    def revision(self) -> dict[str, str]:
        """Networks of learned positions differ."""
        return {"positions": "rotary"}


class DiTConfig(NetworkConfig):
    """Diffusion transformer (Peebles and Xie, 2023)."""

    kind: Literal["dit"] = "dit"
    patch_size: int = Field(2, ge=1)
    model_dim: int = Field(ge=4)
    num_layers: int = Field(12, ge=1)
    num_heads: int = Field(ge=1)

    def _check(self) -> None:
        check_heads(self.model_dim, self.num_heads)


DiffusionNetwork = Annotated[UNetConfig | ImageAttentionUNetConfig | DiTConfig, Field(discriminator="kind")]


class EMACodesConfig(Config):
    """Nearest code; codes are moving averages of latents (van den Oord et al., 2017, appendix A.1)."""

    kind: Literal["vq_ema"] = "vq_ema"
    codebook_size: int = Field(ge=2)
    codebook_dim: int | None = Field(None, ge=1)  # None: latent_channels
    codebook_decay: float = Field(0.99, gt=0, lt=1)  # of the averages
    codebook_init: Literal["data", "kmeans"] = "data"  # latents of the first batch, or their clusters
    l2_normalize: bool = True


class GradientCodesConfig(Config):
    """Nearest code, codes moved by gradient (van den Oord et al., 2017, equation 3)."""

    kind: Literal["vq"] = "vq"
    codebook_size: int = Field(ge=2)
    codebook_dim: int | None = Field(None, ge=1)  # None: latent_channels
    codebook_init: Literal["uniform", "data"] = "uniform"  # U(-1/K, 1/K) as published, or latents of the first batch
    l2_normalize: bool = True


class GumbelCodesConfig(Config):
    """Categorical codes, relaxed during training (Ramesh et al., 2021, section 2.1)."""

    kind: Literal["gumbel"] = "gumbel"
    codebook_size: int = Field(ge=2)
    codebook_dim: int | None = Field(None, ge=1)  # None: latent_channels
    codebook_init: Literal["data", "random"] = "data"  # data: features of the first batch


class ScalarCodesConfig(Config):
    """Finite scalar quantization (Mentzer et al., 2023)."""

    kind: Literal["fsq"] = "fsq"
    levels: tuple[Annotated[int, Field(ge=3)], ...] = Field(min_length=1)  # one a channel; of two none is learned

    @property
    def codebook_size(self) -> int:
        """Number of codes: the product of the levels."""
        return math.prod(self.levels)


class GaussianConfig(Config):
    """A diagonal Gaussian of latent_channels for each position (Kingma and Welling, 2014)."""

    kind: Literal["gaussian"] = "gaussian"
    codebook_size: ClassVar[None] = None  # it has no codes


Bottleneck = Annotated[
    EMACodesConfig | GradientCodesConfig | GumbelCodesConfig | ScalarCodesConfig | GaussianConfig,
    Field(discriminator="kind"),
]


class AutoencoderNetworkConfig(NetworkConfig):
    """Autoencoder with a bottleneck: a VAE, VQ-VAE, dVAE or VQ-GAN, depending on the losses."""

    kind: Literal["autoencoder"] = "autoencoder"
    channels: int = Field(ge=4)
    channel_mult: tuple[int, ...] = Field(min_length=1)  # one level each; every further level halves the grid
    num_res_blocks: int = Field(ge=1)
    attention_resolutions: tuple[int, ...] = ()  # in pixels
    latent_channels: int = Field(ge=1)
    decoder_attention_resolutions: Annotated[tuple[int, ...] | None, Since(None)] = None  # None: as the encoder's
    projections: Annotated[bool, Since(True)] = True  # 1 x 1, around the bottleneck; none in SD 3 and FLUX
    image_channels: Annotated[int, Since(3)] = Field(3, ge=1)  # 1: gray images, as depth maps; or a map's classes
    latent_shift: Annotated[float, Since(0.0)] = 0.0  # off latents, before their scale
    patch_shortcut: bool = False  # a linear map around encoder and decoder: colors in minutes
    norm_groups: int | None = Field(None, ge=1)  # 32 at published sizes; None: so that each keeps four channels
    reconstruction: Literal["l1", "mse", "logit_laplace", "discretized_logistic", "classes"] = "l1"
    shared_scale: Annotated[bool, Since(False)] = False  # of a likelihood: one for all values of an image
    bottleneck: Bottleneck

    def _check(self) -> None:
        channels, of_map = self.image_channels, self.reads_classes
        refuse(of_map and channels == 1, "reconstruction classes needs image_channels, the number of classes")
        colorless = channels not in (1, 3) and not of_map
        refuse(colorless, f"image_channels {channels} is of a map of classes: set reconstruction=classes")
        likelihoods = ("logit_laplace", "discretized_logistic")
        unscaled = self.shared_scale and self.reconstruction not in likelihoods
        refuse(unscaled, f"shared_scale needs reconstruction {' or '.join(likelihoods)}")
        check_norm_groups(self.norm_groups, self.channels, self.channel_mult)
        codes, width = self.bottleneck, self.latent_channels
        if isinstance(codes, GumbelCodesConfig) and codes.codebook_init == "data":
            needs = f"codebook_init data of gumbel needs codebook_dim {width}, that of latent_channels"
            other = codes.codebook_dim not in (None, width)
            refuse(other, f"{needs}, not {codes.codebook_dim}; or take codebook_init random")

    @property
    def reads_classes(self) -> bool:
        """True for a network of maps of classes."""
        return self.reconstruction == "classes"

    @property
    def factor(self) -> int:
        """Pixels of an image's side for each position of the grid."""
        return 2 ** (len(self.channel_mult) - 1)

    @property
    def diffused_channels(self) -> int:
        """Channels of the input of latent diffusion, as in `Autoencoder.diffused_shape`."""
        match self.bottleneck:
            case GaussianConfig():
                return self.latent_channels
            case ScalarCodesConfig(levels=levels):
                return len(levels)
            case GumbelCodesConfig(codebook_size=codebook_size):
                return codebook_size
            case EMACodesConfig(codebook_dim=codebook_dim) | GradientCodesConfig(codebook_dim=codebook_dim):
                return codebook_dim or self.latent_channels


class TokenNetworkConfig(NetworkConfig):
    """Sizes shared by both transformers over tokens."""

    model_dim: int = Field(ge=8)
    num_layers: int = Field(ge=1)
    num_heads: int = Field(ge=1)
    dropout: float = Field(0.0, ge=0, lt=1)
    positions: Literal["learned", "learned_2d", "rotary_2d"] = "learned"  # one table, rows and columns, or rotations

    def _check(self) -> None:
        check_heads(self.model_dim, self.num_heads)
        head_dim = self.model_dim // self.num_heads
        odd = self.positions == "rotary_2d" and head_dim % 4
        refuse(odd, f"positions rotary_2d needs model_dim / num_heads to be a multiple of 4, not {head_dim}")


class TransformerConfig(TokenNetworkConfig):
    """Decoder-only transformer over tokens."""

    kind: Literal["transformer"] = "transformer"
    class_token: Annotated[bool, Since(True)] = True  # else the last token of the conditions predicts the first
    attend_padding: Annotated[bool, Since(False)] = False  # to pads of texts, as to other tokens


class MaskedTransformerConfig(TokenNetworkConfig):
    """Transformer over tokens, some masked (MaskGIT; Chang et al., 2022)."""

    kind: Literal["masked_transformer"] = "masked_transformer"


class PixelNetworkConfig(NetworkConfig):
    """Sizes shared by PixelCNN and Row LSTM, networks over single values (van den Oord et al., 2016)."""

    channels: int = Field(ge=2)
    num_layers: int = Field(ge=1)  # after the first, which has a kernel of 7
    kernel_size: int = Field(5, ge=3)
    dropout: float = Field(0.0, ge=0, lt=1)

    def _check(self) -> None:
        refuse(self.kernel_size % 2 == 0, f"kernel_size must be odd, not {self.kernel_size}")


class PixelCNNConfig(PixelNetworkConfig):
    """Gated PixelCNN."""

    kind: Literal["pixelcnn"] = "pixelcnn"


class RowLSTMConfig(PixelNetworkConfig):
    """Row LSTM."""

    kind: Literal["row_lstm"] = "row_lstm"


class GANConfig(NetworkConfig):
    """Generator of the class-conditional residual GAN (Brock et al., 2019)."""

    kind: Literal["gan"] = "gan"
    channels: int = Field(ge=4)
    channel_mult: tuple[int, ...] = Field(min_length=1)  # from the full resolution down, by halves
    noise_dim: int = Field(ge=1)
    attention_resolutions: tuple[int, ...] = ()  # in pixels, of the discriminator too
    shared_dim: Annotated[int | None, Since(None)] = Field(None, ge=1)  # a class vector for all norms; None: tables

    def _check(self) -> None:
        parts = len(self.channel_mult) + 1
        uneven = self.shared_dim is not None and self.noise_dim % parts
        refuse(uneven, f"shared_dim needs noise_dim to be a multiple of {parts}, levels and one, not {self.noise_dim}")


class ClassifierNetworkConfig(NetworkConfig):
    """The encoder of a U-Net with a class at the end (Dhariwal and Nichol, 2021)."""

    kind: Literal["classifier"] = "classifier"
    model_channels: int = Field(ge=4, multiple_of=2)
    channel_mult: tuple[int | float, ...] = Field(min_length=1)
    num_res_blocks: int = Field(ge=1)
    attention_resolutions: tuple[int, ...] = ()  # in pixels
    head_dim: int = Field(32, ge=1)
    dropout: float = Field(0.0, ge=0, lt=1)
    norm_groups: int | None = Field(None, ge=1)  # 32 at published sizes; None: so that each keeps four channels

    def _check(self) -> None:
        check_norm_groups(self.norm_groups, self.model_channels, self.channel_mult)


class ContrastiveNetworkConfig(NetworkConfig):
    """Text (`TextConfig`) and image encoders into a common space (CLIP; Radford et al., 2021)."""

    kind: Literal["contrastive"] = "contrastive"
    channels: int = Field(ge=4)
    channel_mult: tuple[int, ...] = Field(min_length=1)  # one a level, each half the sides
    num_res_blocks: int = Field(ge=1)
    patch_size: int = Field(4, ge=1)  # pixels; the first level has a position for each patch
    embedding_dim: int = Field(ge=2)
    norm_groups: int | None = Field(None, ge=1)  # None: 32, or fewer so that each keeps four channels

    def _check(self) -> None:
        check_norm_groups(self.norm_groups, self.channels, self.channel_mult)


class DiffusionPriorNetworkConfig(NetworkConfig):
    """Transformer over a caption and a noised embedding (DALL-E 2; Ramesh et al., 2022, section 2.2)."""

    kind: Literal["diffusion_prior"] = "diffusion_prior"
    model_dim: int = Field(ge=8)
    num_layers: int = Field(ge=1)
    num_heads: int = Field(ge=1)
    dropout: float = Field(0.0, ge=0, lt=1)

    def _check(self) -> None:
        width, heads = self.model_dim, self.num_heads
        refuse(width % (2 * heads), f"model_dim {width} must be a multiple of twice num_heads {heads}")


def check_heads(model_dim: int, num_heads: int) -> None:
    """Raise ValueError unless the heads share the width equally."""
    refuse(model_dim % num_heads, f"model_dim {model_dim} must be a multiple of num_heads {num_heads}")


def check_norm_groups(norm_groups: int | None, channels: int, channel_mult: Iterable[float]) -> None:
    """Raises ValueError, naming the width, unless groups divide channels * mult at every level."""
    for mult in channel_mult:
        uneven = norm_groups is not None and int(channels * mult) % norm_groups
        refuse(uneven, f"norm_groups {norm_groups} must divide the channels of every level, not {mult}x{channels}")
