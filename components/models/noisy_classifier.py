"""Classifier of noisy images for guidance: ADM's U-Net down to the middle, and an attention pool.
Source: Dhariwal and Nichol (2021), section 4 and appendix I; the pool is that of CLIP (Radford et al., 2021, 2.4).
Shapes: B batch, C channels, H W height and width of a feature map, D = 4 * model_channels, K num_classes."""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from components.models.conditioned import embedding_mlp
from components.models.devices import autocast
from components.models.layers import GroupNorm, SelfAttention2d, attend, timestep_embedding
from components.models.unet_blocks import Paths, TimedResBlock, heads_of, levels_of


class NoisyClassifier(nn.Module):
    """Class of the image behind x_t, given the time.
    Arguments are those of `UNet`; `head_dim` or `num_heads` are of the pool too. Raises ValueError for sizes that do
    not fit each other."""

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
        residual = partial(
            TimedResBlock,
            embedding_dim=embedding_dim,
            dropout=dropout,
            scale_shift_norm=scale_shift_norm,
            norm_groups=norm_groups,
        )

        def attention(channels: int) -> nn.Module:
            return SelfAttention2d(channels, num_heads=heads(channels), norm_groups=norm_groups)

        self.time_mlp = embedding_mlp(model_channels, embedding_dim)
        self.conv_in = nn.Conv2d(in_channels, levels[0].channels, 3, padding=1)
        paths = Paths(levels, num_res_blocks, residual, attention, resample_in_blocks)
        self.down, _ = paths.down()
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
        frequencies = timestep_embedding(time, self.model_channels).to(self.conv_in.weight.dtype)
        embedding = F.silu(self.time_mlp(frequencies))  # (B, D)
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
