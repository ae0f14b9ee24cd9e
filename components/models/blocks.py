"""Pre-norm transformer blocks (Radford et al. 2019), with an optional cache for attention.

Shapes: B batch, S sequence, D model_dim, H heads, E head_dim = D / H.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from components.models.layers import attend
from components.models.network_blocks import NetworkBlock
from components.models.rotary import rotate


@dataclass(slots=True)
class KVCache:
    """Keys and values of every layer, allocated once for the whole sequence."""

    keys: tuple[Tensor, ...]  # num_layers of (B, H, whole sequence, E)
    values: tuple[Tensor, ...]  # num_layers of (B, H, whole sequence, E)
    visible: Tensor | None  # (B, 1, 1, whole sequence)  bool, False at text pads; None when there is no text
    length: int  # how many positions are filled


class SelfAttention(nn.Module):
    """Multi-head attention, (B, S, D) -> (B, S, D), to earlier positions or to all positions."""

    def __init__(self, model_dim: int, *, num_heads: int, causal: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.causal = causal
        self.qkv = nn.Linear(model_dim, 3 * model_dim)
        self.proj = nn.Linear(model_dim, model_dim)

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None,
        rotation: Tensor | None = None,
        cache: tuple[Tensor, Tensor] | None = None,
        start: int | Tensor = 0,
    ) -> Tensor:
        """`x` stands at positions start..start+S, where `cache`, keys and values of (B, H, …, E), is filled.

        Args:
            mask: bool, broadcast to (B, H, S, start + S), True where a key may be seen; it replaces the causal one.
            rotation: (S, E / 2, 2), of the positions of `x`; see `rotate`.
            start: or, for S = 1, () int64 on the device: then the mask is that of the whole sequence.
        """
        batch, length, _ = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)  # (B, H, S, E) each
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        if cache is not None:
            k, v = (kept_with(new, whole, start) for new, whole in zip((k, v), cache, strict=True))
        h = attend(q, k, v, mask=mask, causal=self.causal and mask is None and length > 1)
        return self.proj(h.transpose(1, 2).reshape(batch, length, -1))


class Block(NetworkBlock):
    """Attention, then a feed-forward network, each pre-norm with a residual, (B, S, D) -> (B, S, D).

    Dropout is on the residual branches alone, as in LlamaGen (Sun et al. 2024): none of the attention weights is
    dropped, which keeps fused attention kernels in training.
    """

    def __init__(self, model_dim: int, *, num_heads: int, dropout: float, causal: bool = True) -> None:
        super().__init__()
        self.norm_1 = nn.LayerNorm(model_dim)
        self.attention = SelfAttention(model_dim, num_heads=num_heads, causal=causal)
        self.norm_2 = nn.LayerNorm(model_dim)
        self.expand = nn.Linear(model_dim, 4 * model_dim)
        self.contract = nn.Linear(4 * model_dim, model_dim)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None,
        rotation: Tensor | None = None,
        cache: tuple[Tensor, Tensor] | None = None,
        start: int | Tensor = 0,
    ) -> Tensor:
        attended = self.attention(self.norm_1(x), mask=mask, rotation=rotation, cache=cache, start=start)
        x = x + self.dropout(attended)
        return x + self.dropout(self.contract(F.gelu(self.expand(self.norm_2(x)))))


def kept_with(new: Tensor, whole: Tensor, start: int | Tensor) -> Tensor:
    """Write keys or values (B, H, S, E) into a cache from `start` on, and return the filled cache.

    The result ends with the new entries or, where `start` is a number on the device, is the whole cache: no shape may
    depend on a number on the device.
    """
    if isinstance(start, Tensor):
        return whole.index_copy_(2, start[None], new.to(whole.dtype))
    filled = whole[:, :, : start + new.shape[2]]
    filled[:, :, start:] = new
    return filled
