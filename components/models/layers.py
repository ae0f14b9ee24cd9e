"""Shared parts of networks: blocks, timestep embedding, group norm, attention, rotary positions, text.

The text encoder is a small bidirectional transformer over BPE ids (Vaswani et al., 2017), pre-norm as in GPT-2. Padding
is id 0, or another where a published model has it so, and stands only at the end of a row, which has at least one real
token (the empty text is begin and end).

Shapes: B batch, C channels, H W height and width, D embedding size or model_dim; in attention S sequence, E head_dim; L
text length, N context_length."""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from components.models.devices import autocast

VARIANTS = 256  # of one class of blocks in one network: sizes, with and without gradient


def timestep_embedding(timesteps: Tensor, dim: int, *, shift: int = 0, sines_first: bool = False) -> Tensor:
    """Sinusoidal embedding (B, dim) float32 of timesteps (B,), cosines first (Vaswani et al., 2017).
    Frequencies are exp(-ln(10000) i / (half - shift)), half = dim / 2. Ho et al. (2020) shift by 1, sines first."""
    half = dim // 2
    frequencies = torch.exp(-math.log(10_000) / (half - shift) * torch.arange(half, device=timesteps.device))
    angles = timesteps.float()[:, None] * frequencies
    cosines, sines = angles.cos(), angles.sin()
    return torch.cat([sines, cosines] if sines_first else [cosines, sines], dim=1)


def groups_of(channels: int, norm_groups: int | None) -> int:
    """Groups of a group norm: `norm_groups` where given, else at most 32 of at least four channels.
    Published networks have 32 groups at any width; four channels a group are a rule of Karras et al. (2022). One
    channel a group, as 32 groups of 32 channels would have, erases every channel's mean."""
    return norm_groups or math.gcd(channels, min(32, channels // 4))


class GroupNorm(nn.GroupNorm):
    """Group norm of `groups_of` with statistics in fp32, under autocast too.
    Raises ValueError if groups don't divide the channels. On a CPU it returns the dtype of its weights, for the bf16
    kernel for channels_last is several times slower there; elsewhere the dtype that it was given, by
    `Normalized16Bits`: what follows keeps half of the bytes."""

    def __init__(self, channels: int, *, norm_groups: int | None = None, eps: float = 1e-5) -> None:
        super().__init__(groups_of(channels, norm_groups), channels, eps=eps)

    def forward(self, input: Tensor) -> Tensor:  # (B, C, ...)
        if input.device.type == "cpu" or input.dtype == self.weight.dtype:
            return super().forward(input.to(self.weight.dtype))
        return Normalized16Bits.apply(input, self.weight, self.bias, self.num_groups, self.eps)


class Normalized16Bits(torch.autograd.Function):
    """Group norm of x (B, C, ...) of 16 bits in fp32, returned in 16 bits.
    Result and gradient lie in memory as x does, so that convolutions in NHWC get NHWC. The backward pass keeps x
    itself, not the copy of twice the bytes that `x.float()` would leave: 2.9 GB for a sample of ADM at 256² in place of
    4.0."""

    @staticmethod
    def forward(  # pyrefly: ignore[bad-override]
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float
    ) -> Tensor:
        whole = x.to(weight.dtype, memory_format=torch.contiguous_format)  # NCHW, as torch's kernels for GPUs take it
        sizes = (len(x), x.shape[1], x[0, 0].numel())
        y, mean, rstd = torch.native_group_norm(whole, weight, bias, *sizes, num_groups, eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.num_groups = num_groups
        return torch.empty_like(x).copy_(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        x, weight, mean, rstd = ctx.saved_tensors
        given = (tensor.to(weight.dtype, memory_format=torch.contiguous_format) for tensor in (gradient, x))
        sizes = x.shape[:2]
        moments, needed = (mean, rstd, weight), ctx.needs_input_grad[:3]
        of_x, of_weight, of_bias = torch.ops.aten.native_group_norm_backward(
            *given, *moments, *sizes, x[0, 0].numel(), ctx.num_groups, needed
        )
        return (None if of_x is None else torch.empty_like(x).copy_(of_x)), of_weight, of_bias, None, None


def logits_of(head: nn.Module, x: Tensor) -> Tensor:
    """Logits by a head, from features x that are fp32 whatever the products before were.
    Where they are drawn from or measured the head multiplies in fp32 under autocast too: guidance at scale s would
    multiply a rounding by up to 2 s - 1. In training a head of a large codebook in fp32 would take a third of a
    step."""
    if torch.is_grad_enabled():
        return head(x)
    with autocast(x.device, enabled=False):
        return head(x.to(next(head.parameters()).dtype))


def zeroed(module: nn.Module) -> nn.Module:
    """Set all parameters to zero: a residual branch with such an end starts as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def attend(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """Scaled dot-product attention with a softmax in fp32, on (B, heads, L, head_dim).

    Args:
        mask: boolean, broadcast to (B, heads, L, L), True where a key may be seen.
        causal: each query sees the keys up to its own position; without a mask only.
    """
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    with autocast(q.device, enabled=False):  # the CPU kernel's bf16 backward is several times slower than fp32
        dtype = torch.promote_types(q.dtype, torch.float32)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)


class SelfAttention2d(nn.Module):
    """Residual attention among all positions of a feature map (Ho et al., 2020).
    Queries, keys and values are outermost in the projection (ADM's "new attention order"), heads inside. `halves`: the
    sum is divided by sqrt(2) (Song et al., 2021)."""

    def __init__(
        self,
        channels: int,
        *,
        num_heads: int,
        norm_groups: int | None = None,
        eps: float = 1e-5,
        halves: bool = False,
    ) -> None:
        super().__init__()
        self.num_heads, self.halves = num_heads, halves
        self.norm = GroupNorm(channels, norm_groups=norm_groups, eps=eps)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)  # pointwise: on CPUs faster than nn.Linear in fp32
        self.proj = zeroed(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, C, H, W)
        qkv = self.qkv(self.norm(x))
        q, k, v = rearrange(qkv, "b (three heads d) h w -> three b heads (h w) d", three=3, heads=self.num_heads)
        h = attend(q, k, v)
        x = x + self.proj(rearrange(h, "b heads (h w) d -> b (heads d) h w", h=x.shape[2]))
        return x * math.sqrt(0.5) if self.halves else x


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Turn each pair of features of x (B, H, S, E) by the position's angle (Su et al. 2021, eq. 34).
    `rotation` holds cosine and sine of each pair's angle, (S, E / 2, 2). Products of rotated queries and keys depend on
    the difference of their angles alone."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)  # (B, H, S, E / 2)
    cos, sin = rotation.unbind(-1)  # (S, E / 2)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2).to(x.dtype)


def grid_rotation(
    height: int,
    width: int,
    *,
    head_dim: int,
    theta: float = 10000.0,
    pitch: float = 1.0,
    device: torch.device | None = None,
) -> Tensor:
    """Rotations of the places of a grid in raster order, (height * width, E / 2, 2): cosine and sine.
    Axial (Heo et al., 2024): the first half of the features turns with the row, the second with the column, each pair
    slower than the one before by the same factor, down to about 1 / theta. `pitch` is the distance between neighbors,
    half of it around the grid: n places at 1 and 2 n at 1/2 cover the same square. At 1 the first place is not
    turned."""
    frequencies = theta ** -(torch.arange(0, head_dim // 2, 2, device=device) / (head_dim // 2))  # (E / 4,)
    rows, columns = ((torch.arange(size, device=device) + 0.5) * pitch - 0.5 for size in (height, width))
    places = torch.cartesian_prod(rows, columns)  # (N, 2)
    angles = (places[:, :, None] * frequencies).flatten(1)  # (N, E / 2)
    return torch.stack([angles.cos(), angles.sin()], dim=-1)


class NetworkBlock(nn.Module):
    """A part repeated many times in a network, the unit of compilation, recomputation and sharding.
    Names of weights are independent of blocks."""

    recomputed = False  # in the backward pass, instead of keeping what it needs of the forward pass

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.recomputed and torch.is_grad_enabled():
            return checkpoint(super().__call__, *args, use_reentrant=False, **kwargs)  # restores autocast and dropout
        return super().__call__(*args, **kwargs)


def blocks_of(network: nn.Module, prefix: str = "") -> dict[str, NetworkBlock]:
    """The blocks of a network by name, after a prefix, without blocks inside other blocks."""
    blocks: dict[str, NetworkBlock] = {}
    for name, child in network.named_children():
        is_block = isinstance(child, NetworkBlock)
        blocks |= {prefix + name: child} if is_block else blocks_of(child, f"{prefix}{name}.")
    return blocks


MULTIPLIED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def rounded_maps(module: nn.Module) -> set[nn.Module]:
    """The maps in a module whose weights autocast rounds to bf16 before any use: all but those `in_fp32`."""
    maps: set[nn.Module] = {module} if isinstance(module, MULTIPLIED) else set()
    for name, child in module.named_children():
        if name not in getattr(module, "in_fp32", ()):
            maps |= rounded_maps(child)
    return maps


def recompute_blocks(network: nn.Module) -> None:
    """Keep only each block's input for the backward pass, and compute the block again there.
    The same gradients, bit for bit, with less memory and a third more time (Chen et al., 2016, "Training Deep Nets with
    Sublinear Memory Cost")."""
    for block in blocks_of(network).values():
        block.recomputed = True


def compile_blocks(network: nn.Module, *, backend: str = "inductor") -> None:
    """Compile a network in place at the first call, block by block, or whole without blocks.
    Equal blocks are compiled once; copies, such as an average's network, are not. Each size is compiled by itself: one
    for all sizes would be slower, and round otherwise once a second one came."""
    for part in blocks_of(network).values() or [network]:
        part.compile(backend=backend, dynamic=False, recompile_limit=VARIANTS)


PAD_ID = 0


class EncodedText(NamedTuple):
    """States of a batch of texts: one for each token, and one for the whole text."""

    states: Tensor  # (B, L, D)  one state a token; those of padding mean nothing
    pooled: Tensor  # (B, D)     the state of the last token that is not padding


class TextTransformer(nn.Module):
    """Encode token ids; padding, the tokens `pad_id`, is never attended to, so its amount changes nothing.
    With `learned_padding` every text is padded to N tokens, each pad has a learned vector of its position, all are
    attended to and the last is pooled (as in the code of Nichol et al., 2022): then L of the encoded text is N."""

    def __init__(
        self,
        *,
        vocab_size: int,
        context_length: int,
        model_dim: int,
        num_layers: int,
        num_heads: int,
        learned_padding: bool = False,
        pad_id: int = PAD_ID,
    ) -> None:
        super().__init__()
        self.pad_id = pad_id
        self.token_embedding = nn.Embedding(vocab_size, model_dim)
        self.position_embedding = nn.Parameter(torch.zeros(context_length, model_dim))
        self.blocks = nn.ModuleList([TextBlock(model_dim, num_heads=num_heads) for _ in range(num_layers)])
        self.norm = nn.LayerNorm(model_dim)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.position_embedding, std=0.01)
        padding = torch.randn(context_length, model_dim) * 0.01 if learned_padding else None
        self.padding_embedding = None if padding is None else nn.Parameter(padding)

    def forward(self, text: Tensor) -> EncodedText:  # (B, L) int64
        """Raise ValueError when L exceeds context_length."""
        length, context_length = text.shape[1], self.position_embedding.shape[0]
        if length > context_length:
            raise ValueError(f"text has {length} tokens, the encoder takes at most {context_length}")
        present = self.visible(text)  # (B, L)
        mask = rearrange(present, "b l -> b 1 1 l")
        if self.padding_embedding is None:
            x = self.token_embedding(text) + self.position_embedding[:length]
        else:
            text = F.pad(text, (0, context_length - length), value=self.pad_id)
            x = self.token_embedding(text) + self.position_embedding
            x = torch.where((text == self.pad_id)[..., None], self.padding_embedding, x)
        for block in self.blocks:
            x = block(x, mask)
        states = self.norm(x)
        last = present.sum(1) - 1  # (B,)
        return EncodedText(states, states[torch.arange(text.shape[0], device=text.device), last])

    def visible(self, text: Tensor) -> Tensor:
        """Mask of the encoded tokens open to attention, (B, L) bool."""
        if self.padding_embedding is None:
            return text != self.pad_id
        return torch.ones(text.shape[0], len(self.position_embedding), dtype=torch.bool, device=text.device)


class TextBlock(NetworkBlock):
    """Pre-norm attention and feed-forward of four times the width."""

    def __init__(self, model_dim: int, *, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm = nn.LayerNorm(model_dim)
        self.qkv = nn.Linear(model_dim, 3 * model_dim)
        self.proj = nn.Linear(model_dim, model_dim)
        self.mlp = nn.Sequential(
            nn.LayerNorm(model_dim), nn.Linear(model_dim, 4 * model_dim), nn.GELU(), nn.Linear(4 * model_dim, model_dim)
        )

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:  # (B, L, D), (B, 1, 1, L) True where a key may be seen
        qkv = self.qkv(self.attention_norm(x))
        q, k, v = rearrange(qkv, "b l (three heads d) -> three b heads l d", three=3, heads=self.num_heads)
        h = attend(q, k, v, mask=mask)
        x = x + self.proj(rearrange(h, "b heads l d -> b l (heads d)"))
        return x + self.mlp(x)
