"""Common parts of transformers over image tokens: blocks with a cache, tables, positions, head.

The sequence is [text tokens][condition tokens][class token] + image tokens. Without classes the class token is the
start token; published models of text may lack it. Conditions have tables of their own, so no class, word or token of
another image ever shares a vector with an image token.

Shapes: B batch, N num_tokens, L text_length, M condition tokens, P = L + M + 1 tokens of the conditions together
(without a class token L + M), S sequence, D model_dim, H heads, E head_dim = D / H, K codebook_size."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from components.models.layers import NetworkBlock, attend, grid_rotation, rotate


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
        self.num_heads, self.causal = num_heads, causal
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

        `mask` is bool, broadcast to (B, H, S, start + S), True where a key may be seen, and replaces the causal one;
        `rotation` (S, E / 2, 2) is of the positions of `x`, see `rotate`. For S = 1 `start` may be () int64 on the
        device: then the mask is that of the whole sequence."""
        batch, length, _ = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)  # (B, H, S, E) each
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        for new, whole in zip((k, v), cache or (), strict=False):
            if isinstance(start, Tensor):
                whole.index_copy_(2, start[None], new.to(whole.dtype))
            else:
                whole[:, :, start : start + length] = new
        if cache is not None:  # filled up to here; no shape may depend on a start that the device alone knows
            k, v = cache if isinstance(start, Tensor) else (whole[:, :, : start + length] for whole in cache)
        h = attend(q, k, v, mask=mask, causal=self.causal and mask is None and length > 1)
        return self.proj(h.transpose(1, 2).reshape(batch, length, -1))


class Block(NetworkBlock):
    """Attention and feed-forward network, each pre-norm with a residual, (B, S, D) (Radford et al. 2019).
    Dropout is on the residual branches alone, as in LlamaGen (Sun et al. 2024): none of the attention weights is
    dropped, which keeps fused attention kernels in training."""

    def __init__(self, model_dim: int, *, num_heads: int, dropout: float, causal: bool = True) -> None:
        super().__init__()
        self.norm_1 = nn.LayerNorm(model_dim)
        self.attention = SelfAttention(model_dim, num_heads=num_heads, causal=causal)
        self.norm_2 = nn.LayerNorm(model_dim)
        self.expand = nn.Linear(model_dim, 4 * model_dim)
        self.contract = nn.Linear(4 * model_dim, model_dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, **attention: Any) -> Tensor:
        """Keywords are those of `SelfAttention.forward`."""
        x = x + self.dropout(self.attention(self.norm_1(x), **attention))
        return x + self.dropout(self.contract(F.gelu(self.expand(self.norm_2(x)))))


Positions = Literal["learned", "learned_2d", "rotary_2d"]


class TokenNetwork(nn.Module):
    """Tables, positions, blocks and head, a base class for the two transformers.

    Args:
        codebook_size: number of different tokens.
        num_tokens: tokens of an image, in raster order.
        model_dim, num_layers, num_heads: model_dim is a multiple of num_heads.
        grid: (height, width) of an image in tokens. None: one row.
        positions: of the image's tokens. "learned": one table with a row for each place of the sequence;
            "learned_2d": a table of rows and one of columns, added; "rotary_2d": queries and keys are turned by row and
            column, those of conditions are not, and head_dim is a multiple of 4. Text and condition tokens always have
            learned positions of their own.
        num_classes: classes; their table has one row more, the null label `num_classes`. None: no classes.
        vocab_size: number of text tokens, 0 being the pad. None: no text.
        text_length: tokens of every text, pads at the end included; given with vocab_size.
        condition_codebook_size: number of different tokens of the condition image, made by a tokenizer of its own;
            their table has one row more, the null token `condition_codebook_size`. None: no condition image.
        condition_grid: (height, width) of the condition image in tokens; given with condition_codebook_size.
        dropout: probability, in [0, 1), after the embedding and on each residual branch.
        class_token: without it the last token of the conditions predicts the first of the image (minDALL-E; the
            transformer over depth of taming-transformers), and row i of a table of positions is of token i itself.
        attend_padding: text pads are tokens as others, whatever their id (minDALL-E).

    Raises ValueError when sizes do not fit each other, or only one of two that belong together is given."""

    causal: ClassVar[bool]
    rotation: Tensor | None

    def __init__(
        self,
        *,
        codebook_size: int,
        num_tokens: int,
        model_dim: int,
        num_layers: int,
        num_heads: int,
        grid: Sequence[int] | None = None,
        positions: Positions = "learned",
        num_classes: int | None = None,
        vocab_size: int | None = None,
        text_length: int | None = None,
        condition_codebook_size: int | None = None,
        condition_grid: Sequence[int] | None = None,
        dropout: float = 0.0,
        class_token: bool = True,
        attend_padding: bool = False,
    ) -> None:
        super().__init__()
        height, width = grid or (1, num_tokens)
        if height * width != num_tokens:
            raise ValueError(f"a grid of {height}×{width} does not have num_tokens {num_tokens}")
        if model_dim % num_heads:
            raise ValueError(f"model_dim {model_dim} is not a multiple of num_heads {num_heads}")
        if (vocab_size is None) != (text_length is None):
            raise ValueError(f"give both or neither of {vocab_size=} and {text_length=}")
        if (condition_codebook_size is None) != (condition_grid is None):
            raise ValueError(f"give both or neither of {condition_codebook_size=} and {condition_grid=}")
        if not class_token and (not self.causal or num_classes is not None or not (text_length or condition_grid)):
            raise ValueError("class_token=False needs a causal transformer with text or a condition image, no classes")
        self.class_token, self.attend_padding = class_token, attend_padding
        self.codebook_size, self.num_tokens, self.num_heads = codebook_size, num_tokens, num_heads
        self.grid, self.positions = (height, width), positions
        self.null_label, self.null_condition = num_classes or 0, condition_codebook_size or 0
        self.text_length, self.condition_grid = text_length or 0, tuple(condition_grid or (0, 0))
        self.condition_length = math.prod(self.condition_grid)
        self.num_conditions = self.text_length + self.condition_length + int(class_token)  # P
        if class_token:
            self.class_embedding = nn.Embedding(self.null_label + 1, model_dim)
        if vocab_size is not None:
            self.text_embedding = nn.Embedding(vocab_size, model_dim)
            self.text_position = nn.Parameter(torch.empty(self.text_length, model_dim))
        if condition_codebook_size is not None:
            self.condition_embedding = nn.Embedding(condition_codebook_size + 1, model_dim)
            self.condition_position = nn.Parameter(torch.empty(self.condition_length, model_dim))
        self.token_embedding = nn.Embedding(codebook_size + int(not self.causal), model_dim)  # with a mask token
        self._make_positions(model_dim)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            Block(model_dim, num_heads=num_heads, dropout=dropout, causal=self.causal) for _ in range(num_layers)
        )
        self.norm_out = nn.LayerNorm(model_dim)
        self.head = nn.Linear(model_dim, codebook_size, bias=False)
        self._initialize()

    def _make_positions(self, model_dim: int) -> None:
        height, width = self.grid
        rotation = None
        if self.positions == "learned":
            rows = self.num_tokens - int(not self.class_token)  # the last token of an image predicts nothing
            self.position = nn.Parameter(torch.empty(rows, model_dim))
        elif self.positions == "learned_2d":
            self.row_position = nn.Parameter(torch.empty(height, model_dim))
            self.column_position = nn.Parameter(torch.empty(width, model_dim))
        else:
            head_dim = model_dim // self.num_heads
            if head_dim % 4:
                raise ValueError(f"rotary_2d positions need a head_dim that is a multiple of 4, not {head_dim}")
            places = grid_rotation(height, width, head_dim=head_dim)  # (N, E / 2, 2)
            rotation = torch.cat([places[:1].expand(self.num_conditions, -1, -1), places])
        self.register_buffer("rotation", rotation, persistent=False)  # (P + N, E / 2, 2), conditions are not turned

    def _initialize(self) -> None:
        """N(0, 0.02), over sqrt(number of residual branches) at the end of each (Radford et al. 2019)."""
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                residual = name.endswith(("attention.proj.weight", "contract.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * len(self.blocks)) if residual else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    def _place(self, x: Tensor, first: int | Tensor) -> Tensor:
        """Add learned positions of the image's places first..first+n to x (B, n, D). `first` may be () int64."""
        if self.positions == "learned":
            return x + part_of(self.position, first, x.shape[1])
        if self.positions == "learned_2d":
            places = torch.arange(x.shape[1], device=x.device) + first
            width = self.grid[1]
            return x + (self.row_position[places // width] + self.column_position[places % width])
        return x

    def _embed_conditions(
        self,
        batch_size: int,
        *,
        label: Tensor | None = None,
        text: Tensor | None = None,
        condition: Tensor | None = None,
    ) -> Tensor:
        """Vectors of [text][condition][class], (B, P, D), with a position for a predicting class token."""
        _check_length("text", text, self.text_length, f"text_length is {self.text_length}")
        height, width = self.condition_grid
        _check_length("condition", condition, self.condition_length, f"condition_grid is {height}×{width}")
        parts = []
        if self.class_token:
            if label is None:
                label = torch.full((batch_size,), self.null_label, device=self.device)
            x = self.class_embedding(label)[:, None]  # (B, 1, D)
            parts = [self._place(x, 0) if self.causal else x]
        if condition is not None:
            parts.insert(0, self.condition_embedding(condition) + self.condition_position)
        if text is not None:
            parts.insert(0, self.text_embedding(text) + self.text_position)
        return torch.cat(parts, dim=1)

    def _visible(self, text: Tensor | None) -> Tensor | None:
        """Mask of the sequence's visible positions (B, 1, 1, S), False at text pads; None: all."""
        if text is None or self.attend_padding:
            return None
        rest = self.num_conditions - self.text_length + self.num_tokens - self.causal  # nothing follows the last token
        return F.pad(text != 0, (0, rest), value=True)[:, None, None]


def part_of(table: Tensor, first: int | Tensor, length: int) -> Tensor:
    """Rows first..first+length of a table; `first` may be () int64 on the same device."""
    if isinstance(first, Tensor):
        return table.index_select(0, torch.arange(length, device=table.device) + first)
    return table[first : first + length]


def _check_length(name: str, tokens: Tensor | None, length: int, expected: str) -> None:
    if (0 if tokens is None else tokens.shape[1]) != length:
        raise ValueError(f"{name} of {None if tokens is None else tuple(tokens.shape)}, {expected}")
