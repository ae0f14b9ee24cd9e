"""Diffusion transformer with zero-initialized adaptive layer norm (DiT; Peebles and Xie, 2023).
Shapes: B batch, H W height and width, P patch_size, N = (H / P) * (W / P) tokens, D model_dim."""

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from components.models.conditioned import ConditionedNetwork
from components.models.devices import autocast
from components.models.layers import NetworkBlock, attend, zeroed

FREQUENCY_DIM = 256


class DiT(ConditionedNetwork):
    """Predict noise, x_0 or v from x_t, given the time and any of the conditions of `ConditionedNetwork`.

    Args:
        resolution: H = W of x_t, a multiple of patch_size.
        patch_size: P; each token is a square of so many pixels.
        model_dim: D, a multiple of num_heads and of 4.
        num_layers: number of blocks.
        conditions: see `ConditionedNetwork`; of a text it knows what is pooled.

    Raises ValueError for sizes that do not fit each other."""

    positions: Tensor  # (N, D)

    def __init__(
        self, *, resolution: int, patch_size: int, model_dim: int, num_layers: int, num_heads: int, **conditions: Any
    ) -> None:
        if resolution % patch_size:
            raise ValueError(f"resolution {resolution} is not a multiple of patch_size {patch_size}")
        if model_dim % num_heads or model_dim % 4:
            raise ValueError(f"model_dim {model_dim} is not a multiple of num_heads {num_heads} and of 4")
        super().__init__(
            embedding_dim=model_dim, frequency_dim=FREQUENCY_DIM, pool_text=True, class_token_dim=None, **conditions
        )
        self.resolution, self.patch_size = resolution, patch_size
        for parameter in self.time_mlp.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)
        if self.class_embedding is not None:
            nn.init.normal_(self.class_embedding.weight, std=0.02)
        self.patches = xavier(nn.Conv2d(self.input_channels, model_dim, patch_size, stride=patch_size))
        positions = grid_positions(resolution // patch_size, dim=model_dim)
        self.register_buffer("positions", positions, persistent=False)
        self.blocks = nn.ModuleList([DiTBlock(model_dim, num_heads=num_heads) for _ in range(num_layers)])
        self.norm_out = nn.LayerNorm(model_dim, eps=1e-6, elementwise_affine=False)
        self.modulation_out = zeroed(nn.Linear(model_dim, 2 * model_dim))
        self.linear_out = zeroed(nn.Linear(model_dim, patch_size**2 * self.output_channels))

    def forward(self, x_t: Tensor, time: Tensor, **conditions: Tensor | None) -> Tensor:
        """The prediction of `UNet.forward`, with its arguments and errors; x_t has H = W = resolution."""
        if x_t.shape[2:] != (self.resolution, self.resolution):
            raise ValueError(f"x_t is {x_t.shape[2]} x {x_t.shape[3]}, this network takes {self.resolution} squared")
        present = self.checked(x_t, conditions)
        embedding = F.silu(self.embed(time, present)[0])  # (B, D)
        x = self.patches(self.concatenated(x_t, present))
        x = rearrange(x, "b d h w -> b (h w) d") + self.positions
        for block in self.blocks:
            x = block(x, embedding)
        with autocast(x_t.device, enabled=False):  # a bf16 rounding here would be noise in the prediction
            dtype = self.positions.dtype
            shift, scale = self.modulation_out(embedding.to(dtype)).chunk(2, dim=1)
            x = self.linear_out(modulated(self.norm_out(x.to(dtype)), shift, scale))
        size = self.patch_size
        return rearrange(x, "b (h w) (p q c) -> b c (h p) (w q)", h=self.resolution // size, p=size, q=size)


class DiTBlock(NetworkBlock):
    """Attention and feed-forward, each shifted, scaled and gated by the embedding; at first the identity."""

    def __init__(self, dim: int, *, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.modulation = zeroed(nn.Linear(dim, 6 * dim))
        self.norm_1 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.qkv = xavier(nn.Linear(dim, 3 * dim))
        self.proj = xavier(nn.Linear(dim, dim))
        self.norm_2 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.expand = xavier(nn.Linear(dim, 4 * dim))
        self.contract = xavier(nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:  # (B, N, D), (B, D) after SiLU
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.modulation(embedding).chunk(6, dim=1)
        x = x + gate_1[:, None] * self.attention(modulated(self.norm_1(x), shift_1, scale_1))
        h = F.gelu(self.expand(modulated(self.norm_2(x), shift_2, scale_2)), approximate="tanh")
        return x + gate_2[:, None] * self.contract(h)

    def attention(self, x: Tensor) -> Tensor:
        qkv = rearrange(self.qkv(x), "b n (three heads d) -> three b heads n d", three=3, heads=self.num_heads)
        return self.proj(rearrange(attend(*qkv), "b heads n d -> b n (heads d)"))


def xavier(layer: nn.Linear | nn.Conv2d) -> nn.Module:
    """Initialize uniformly by Glorot, a kernel as a matrix on a single patch, and without bias."""
    nn.init.xavier_uniform_(layer.weight.data.flatten(1))  # of a kernel a view
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:  # (B, N, D), (B, D), (B, D)
    return x * (1 + scale[:, None]) + shift[:, None]


def grid_positions(size: int, *, dim: int) -> Tensor:
    """Sinusoidal positions of a square grid in raster order, (size * size, dim).
    The first half of the features stands for the column, the second for the row: sines, then cosines, of frequencies
    10000 ** (-4 i / dim)."""
    frequencies = 10_000 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angles = torch.arange(size)[:, None] * frequencies  # (size, dim / 4)
    line = torch.cat([angles.sin(), angles.cos()], dim=1)  # (size, dim / 2)
    columns, rows = line.repeat(size, 1), line.repeat_interleave(size, dim=0)
    return torch.cat([columns, rows], dim=1).float()
