"""Diffusion U-Net of ADM (Dhariwal and Nichol, 2021), with the U-Nets of DDPM and IDDPM included.

Source of DDPM: Ho et al. (2020); of DDPM++: Song et al. (2021), as Karras et al. (2022) have it. With attention to
text, the network is the U-Net of GLIDE (Nichol et al., 2022) or of latent diffusion (Rombach et al., 2022). ADM's
classifier of noisy images (section 4 and appendix I), for guidance, is the U-Net down to the middle, and an attention
pool, that of CLIP (Radford et al., 2021, 2.4).

Shapes: B batch, C channels, H W height and width, D = 4 * model_channels size of the embedding, K num_classes."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from components.models.conditioned import ConditionedNetwork, embedded_time, embedding_mlp
from components.models.devices import autocast
from components.models.layers import GroupNorm, SelfAttention2d, attend, zeroed
from components.models.unet_blocks import Paths, SpatialTransformer, TextAttention2d, TimedResBlock, heads_of, levels_of

TextConditioning = Literal["pooled", "cross_attention", "spatial_transformer"]


class UNet(ConditionedNetwork):
    """Predict noise, x_0 or v from x_t, given the time and any of the conditions of `ConditionedNetwork`.

    Args:
        resolution: H = W of x_t, to which attention_resolutions refer; divisible by 2 ** (len(channel_mult) - 1).
        model_channels: even; channel_mult multiplies it for each level, by 0.5 too.
        num_res_blocks: residual blocks of each level on the way down; one more on the way up.
        attention_resolutions: in pixels; the middle has attention too.
        head_dim: channels of one attention head; give either this or num_heads.
        dropout: in residual blocks.
        text_conditioning: "pooled": the text is part of the embedding alone; "cross_attention": so it is, and its
            tokens join the keys and values of every attention (GLIDE); "spatial_transformer": every attention is a
            transformer that sees the tokens, and the embedding knows no text (latent diffusion).
        transformer_depth: blocks of each such transformer.
        scale_shift_norm: adaptive group norm; otherwise the embedding is added to the features.
        resample_in_blocks: resampling inside residual blocks; otherwise a strided and an upsampled convolution.
        norm_groups: of every group norm; see `groups_of`.
        norm_eps: of every group norm, but that of spatial transformers.
        plus_plus: DDPM++: the first convolution has model_channels, sums of blocks and of attention are divided by
            sqrt(2), resampled skips are projected, attention on the way up follows a level's last block alone, and the
            label is added to the frequencies of the time.
        pads_end: strided convolutions are padded right and below only (DDPM), not on all sides.
        middle_attention: without it and attention_resolutions, a network of windows can be applied to whole images.
        image_token_dim: features of tokens, patches of image_patch_size pixels of the condition image, which is not
            concatenated then; with rotary positions, of which other tokens have none if `others_nowhere`, else that of
            the first patch.
        conditions: see `ConditionedNetwork`.

    Raises ValueError for sizes that do not fit each other, or attention to tokens where there are none."""

    def __init__(
        self,
        *,
        resolution: int,
        model_channels: int,
        channel_mult: Sequence[float],
        num_res_blocks: int,
        attention_resolutions: Sequence[int],
        head_dim: int | None = None,
        num_heads: int | None = None,
        dropout: float = 0.0,
        text_conditioning: TextConditioning = "pooled",
        transformer_depth: int = 1,
        scale_shift_norm: bool = True,
        resample_in_blocks: bool = True,
        norm_groups: int | None = None,
        norm_eps: float = 1e-5,
        pads_end: bool = False,
        plus_plus: bool = False,
        middle_attention: bool = True,
        class_token_dim: int | None = None,
        image_token_dim: int | None = None,
        image_patch_size: int = 4,
        others_nowhere: bool = False,
        **conditions: Any,
    ) -> None:
        levels = levels_of(resolution, model_channels, channel_mult, attention_resolutions)
        patches: dict[str, Any] = {
            "resolution": resolution,
            "patch_size": image_patch_size,
            "token_dim": image_token_dim,
            "nowhere": others_nowhere,
        }
        super().__init__(
            embedding_dim=4 * model_channels,
            frequency_dim=model_channels,
            pool_text=text_conditioning != "spatial_transformer",
            class_token_dim=class_token_dim,
            class_in_frequencies=plus_plus,
            image_tokens=None if image_token_dim is None else patches,
            **conditions,
        )
        self.resolution, self.model_channels = resolution, model_channels
        norms: dict[str, Any] = {"norm_groups": norm_groups, "eps": norm_eps}
        residual = partial(
            TimedResBlock,
            embedding_dim=4 * model_channels,
            dropout=dropout,
            scale_shift_norm=scale_shift_norm,
            plus_plus=plus_plus,
            **norms,
        )
        attention = attention_of(
            text_conditioning,
            heads=partial(heads_of, head_dim=head_dim, num_heads=num_heads),
            context_dim=context_dim_of(text_conditioning, self.text_dim, class_token_dim, image_token_dim),
            rotary=image_token_dim is not None,
            depth=transformer_depth,
            norms=norms | {"halves": True} if plus_plus else norms,
        )
        paths = Paths(levels, num_res_blocks, residual, attention, resample_in_blocks, pads_end, plus_plus)
        first = model_channels if plus_plus else levels[0].channels
        self.conv_in = nn.Conv2d(self.input_channels, first, 3, padding=1)
        self.down, skips = paths.down(first)
        self.middle = paths.middle(attention=middle_attention)
        self.up = paths.up(skips)
        self.norm_out = GroupNorm(levels[0].channels, norm_groups=norm_groups, eps=norm_eps)
        self.conv_out = zeroed(nn.Conv2d(levels[0].channels, self.output_channels, 3, padding=1))
        # Convolutions then keep their maps so, which is up to twice as fast.
        self.to(memory_format=torch.channels_last)  # pyrefly: ignore[no-matching-overload]

    def forward(self, x_t: Tensor, time: Tensor, **conditions: Tensor | None) -> Tensor:
        """The prediction (B, out_channels, H, W), in float32 under autocast too.
        With a learned variance it is (prediction, v), of 2 * out_channels channels. x_t is (B, in_channels, H, W), time
        (B,) a training step, int64, or any number that stands for the noise. Conditions come by name, of the shapes in
        `components/models/README.md`, low_res enlarged to x_t's size and noised to noise_level.

        Raises ValueError if a condition is missing, is one that the network was not built for, or has another size."""
        present = self.checked(x_t, conditions)
        embedding, context = self.embed(time, present)
        embedding = F.silu(embedding)  # (B, D)
        h = self.conv_in(self.concatenated(x_t, present))
        skips = [h]
        for layers in self.down:
            h = layers(h, embedding, context)
            skips.append(h)
        h = self.middle(h, embedding, context)
        for layers in self.up:
            h = layers(torch.cat([h, skips.pop()], dim=1), embedding, context)
        with autocast(x_t.device, enabled=False):  # a bf16 rounding here would be noise in the prediction
            return self.conv_out(F.silu(self.norm_out(h.to(self.norm_out.weight.dtype))))


def context_dim_of(
    text_conditioning: TextConditioning, text_dim: int | None, class_token_dim: int | None, image_token_dim: int | None
) -> int | None:
    """Features of the tokens seen by attention; None for attention without tokens.
    Raises ValueError if it needs some and there are none, would miss some, or their sizes differ."""
    dims = {dim for dim in (text_dim, class_token_dim, image_token_dim) if dim is not None}
    if text_conditioning != "spatial_transformer" and class_token_dim is not None:
        raise ValueError(f"text_conditioning {text_conditioning} does not see class tokens: spatial_transformer does")
    if text_conditioning == "pooled":
        if image_token_dim is not None:
            raise ValueError("text_conditioning pooled does not see tokens of an image: the others do")
        return None
    if not dims:
        raise ValueError(f"text_conditioning {text_conditioning} needs text, text_states_dim or class_token_dim")
    if len(dims) > 1:
        sizes = f"text {text_dim}, class_token_dim {class_token_dim}, image_token_dim {image_token_dim}"
        raise ValueError(f"tokens that one attention sees must have one size, not {sizes}")
    return dims.pop()


def attention_of(
    text_conditioning: TextConditioning,
    *,
    heads: Callable[[int], int],
    context_dim: int | None,
    rotary: bool,
    depth: int,
    norms: dict[str, Any],
) -> Callable[[int], nn.Module]:
    """Return a factory from channels to attention; it raises ValueError for heads that can't be turned."""

    def attention(channels: int) -> nn.Module:
        if rotary and (head_dim := channels // heads(channels)) % 4:
            raise ValueError(f"heads of {head_dim} channels cannot see tokens of an image: they need a multiple of 4")
        count = heads(channels)
        if context_dim is None:
            return SelfAttention2d(channels, num_heads=count, **norms)
        if text_conditioning == "cross_attention":
            return TextAttention2d(channels, num_heads=count, context_dim=context_dim, **norms)
        sizes = {"num_heads": count, "context_dim": context_dim, "depth": depth}
        return SpatialTransformer(channels, norm_groups=norms["norm_groups"], **sizes)

    return attention


class NoisyClassifier(nn.Module):
    """Class of the image behind x_t, given the time.
    Arguments are those of `UNet`; `head_dim` or `num_heads` are of the pool too. Raises ValueError for bad sizes."""

    def __init__(
        self,
        *,
        resolution: int,
        num_classes: int,
        model_channels: int,
        channel_mult: Sequence[float],
        num_res_blocks: int,
        attention_resolutions: Sequence[int],
        head_dim: int | None = None,
        num_heads: int | None = None,
        dropout: float = 0.0,
        scale_shift_norm: bool = True,
        resample_in_blocks: bool = True,
        norm_groups: int | None = None,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        levels = levels_of(resolution, model_channels, channel_mult, attention_resolutions)
        self.resolution, self.model_channels, self.num_classes = resolution, model_channels, num_classes
        embedding_dim, channels = 4 * model_channels, levels[-1].channels
        heads = partial(heads_of, head_dim=head_dim, num_heads=num_heads)
        norms = {"norm_groups": norm_groups}
        residual = partial(
            TimedResBlock,
            embedding_dim=embedding_dim,
            dropout=dropout,
            scale_shift_norm=scale_shift_norm,
            **norms,
        )
        attention = attention_of("pooled", heads=heads, context_dim=None, rotary=False, depth=0, norms=norms)
        self.time_mlp = embedding_mlp(model_channels, embedding_dim)
        self.conv_in = nn.Conv2d(in_channels, levels[0].channels, 3, padding=1)
        paths = Paths(levels, num_res_blocks, residual, attention, resample_in_blocks)
        self.down, _ = paths.down(levels[0].channels)
        self.middle = paths.middle()
        self.norm_out = GroupNorm(channels, norm_groups=norm_groups)
        size = resolution >> (len(levels) - 1)
        self.pool = AttentionPool2d(channels, size=size, num_heads=heads(channels), out_features=num_classes)
        # Convolutions then keep their maps so, which is up to twice as fast.
        self.to(memory_format=torch.channels_last)  # pyrefly: ignore[no-matching-overload]

    def forward(self, x_t: Tensor, time: Tensor) -> Tensor:
        """Logits (B, K) of x_t (B, in_channels, H, W) at time (B,), float32 under autocast too.
        Raises ValueError if x_t has another size than the network was built for."""
        if x_t.shape[2:] != (self.resolution, self.resolution):
            raise ValueError(f"x_t is {x_t.shape[2]} x {x_t.shape[3]}, this network takes {self.resolution} squared")
        embedding = F.silu(embedded_time(self.time_mlp, time))  # (B, D)
        h = self.conv_in(x_t)
        for layers in self.down:
            h = layers(h, embedding)
        h = self.middle(h, embedding)
        with autocast(x_t.device, enabled=False):  # as in the U-Net: logits and their gradient are exact
            return self.pool(F.silu(self.norm_out(h.to(self.norm_out.weight.dtype))))


class AttentionPool2d(nn.Module):
    """Attention of the mean of all positions to mean and positions, with learned position vectors.
    Channels are a multiple of num_heads; the feature map has H = W = `size`."""

    def __init__(self, channels: int, *, size: int, num_heads: int, out_features: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.positions = nn.Parameter(torch.randn(size**2 + 1, channels) * channels**-0.5)  # the mean comes first
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, out_features)

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, out_features)
        tokens = rearrange(x, "b c h w -> b (h w) c")
        tokens = torch.cat([tokens.mean(1, keepdim=True), tokens], dim=1) + self.positions  # (B, H * W + 1, C)
        q, k, v = rearrange(self.qkv(tokens), "b n (three heads d) -> three b heads n d", three=3, heads=self.num_heads)
        h = attend(q[:, :, :1], k, v)  # (B, heads, 1, d): the answer at the mean is all that is used
        return self.proj(rearrange(h, "b heads 1 d -> b (heads d)"))
