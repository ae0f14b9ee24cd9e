"""Decoder-only, pre-norm transformer over the tokens of a picture (Esser et al. 2021, 3.2; Radford et al. 2019).

The sequence is [text tokens][class token] + image tokens. The class token is always there: without classes it is the
start token. Conditions have tables of their own, so no class or word ever shares a vector with a picture token.

Shapes: B batch, N num_tokens, L text_length, P = L + 1 condition tokens, S sequence, D model_dim, H heads, E head_dim,
K codebook_size.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(slots=True)
class KVCache:
    """Keys and values of every layer, allocated once for the whole sequence."""

    keys: tuple[Tensor, ...]  # num_layers of (B, H, P + N - 1, E)
    values: tuple[Tensor, ...]  # num_layers of (B, H, P + N - 1, E)
    visible: Tensor | None  # (B, 1, 1, P + N - 1)  bool, False at text pads; None when there is no text
    length: int  # how many positions are filled


class SelfAttention(nn.Module):
    """Multi-head causal attention, (B, S, D) -> (B, S, D)."""

    def __init__(self, model_dim: int, *, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.qkv = nn.Linear(model_dim, 3 * model_dim)
        self.proj = nn.Linear(model_dim, model_dim)

    def forward(self, x: Tensor, *, mask: Tensor | None, cache: tuple[Tensor, Tensor] | None, start: int) -> Tensor:
        """`x` stands at positions start..start+S, where `cache`, keys and values of (B, H, P + N - 1, E), is filled."""
        batch, length, _ = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)  # (B, H, S, E) each
        if cache is not None:
            keys, values = (whole[:, :, : start + length] for whole in cache)
            keys[:, :, start:] = k
            values[:, :, start:] = v
            k, v = keys, values
        h = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=mask is None and length > 1,
            dropout_p=self.dropout if self.training else 0.0,
        )
        return self.proj(h.transpose(1, 2).reshape(batch, length, -1))


class Block(nn.Module):
    """Attention, then a feed-forward network, each pre-norm with a residual, (B, S, D) -> (B, S, D)."""

    def __init__(self, model_dim: int, *, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.norm_1 = nn.LayerNorm(model_dim)
        self.attention = SelfAttention(model_dim, num_heads=num_heads, dropout=dropout)
        self.norm_2 = nn.LayerNorm(model_dim)
        self.expand = nn.Linear(model_dim, 4 * model_dim)
        self.contract = nn.Linear(4 * model_dim, model_dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, *, mask: Tensor | None, cache: tuple[Tensor, Tensor] | None, start: int) -> Tensor:
        x = x + self.dropout(self.attention(self.norm_1(x), mask=mask, cache=cache, start=start))
        return x + self.dropout(self.contract(F.gelu(self.expand(self.norm_2(x)))))


class Transformer(nn.Module):
    """Prior over the tokens of a picture, given a class, a text, both or nothing.

    Args:
        codebook_size: number of different tokens.
        num_tokens: tokens of a picture, in raster order.
        model_dim, num_layers, num_heads: model_dim is a multiple of num_heads.
        num_classes: classes; their table has one row more, the null label `num_classes`. None: no classes.
        vocab_size: number of text tokens, 0 being the pad. None: no text.
        text_length: tokens of every text, pads at the end included; given with vocab_size.
        dropout: probability, in [0, 1), after the embedding, in the attention and on each residual branch.

    Raises:
        ValueError: when num_heads does not divide model_dim, or only one of vocab_size and text_length is given.
    """

    def __init__(
        self,
        *,
        codebook_size: int,
        num_tokens: int,
        model_dim: int,
        num_layers: int,
        num_heads: int,
        num_classes: int | None = None,
        vocab_size: int | None = None,
        text_length: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if model_dim % num_heads:
            raise ValueError(f"model_dim {model_dim} is not a multiple of num_heads {num_heads}")
        if (vocab_size is None) != (text_length is None):
            raise ValueError(f"give both or neither of {vocab_size=} and {text_length=}")
        self.codebook_size = codebook_size
        self.num_tokens = num_tokens
        self.num_heads = num_heads
        self.null_label = num_classes or 0
        self.text_length = text_length or 0
        self.class_embedding = nn.Embedding(self.null_label + 1, model_dim)
        if vocab_size is not None:
            self.text_embedding = nn.Embedding(vocab_size, model_dim)
            self.text_position = nn.Parameter(torch.empty(self.text_length, model_dim))
        self.token_embedding = nn.Embedding(codebook_size, model_dim)
        # Row i is added to the input that predicts token i: no row is left unused, and the class token has one.
        self.position = nn.Parameter(torch.empty(num_tokens, model_dim))
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(model_dim, num_heads=num_heads, dropout=dropout) for _ in range(num_layers))
        self.norm_out = nn.LayerNorm(model_dim)
        self.head = nn.Linear(model_dim, codebook_size, bias=False)
        self._initialize()

    def _initialize(self) -> None:
        """N(0, 0.02), smaller at the end of each residual branch by 1 / sqrt(their number) (Radford et al. 2019)."""
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                residual = name.endswith(("attention.proj.weight", "contract.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * len(self.blocks)) if residual else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens: Tensor, *, label: Tensor | None = None, text: Tensor | None = None) -> Tensor:
        """Teacher-forced logits.

        Args:
            tokens: (B, N) int64 in [0, K).
            label: (B,) int64 in [0, num_classes], num_classes being the null label; None stands for the null label.
            text: (B, L) int64, pads (0) at the end; given if and only if the model has a text table.

        Returns:
            (B, N, K), logits[:, i] from the condition and the tokens before i.

        Raises:
            ValueError: when the shape of a condition is not the one that the model was built for.
        """
        condition = self._embed_condition(len(tokens), label=label, text=text)  # (B, P, D)
        image = self.token_embedding(tokens[:, :-1]) + self.position[1:]  # (B, N - 1, D)
        x = self.dropout(torch.cat([condition, image], dim=1))
        mask = None if text is None else _causal_mask(self._visible(text))
        for block in self.blocks:
            x = block(x, mask=mask, cache=None, start=0)
        return self.head(self.norm_out(x[:, self.text_length :]))

    @torch.no_grad()
    def start(
        self, batch_size: int, *, label: Tensor | None = None, text: Tensor | None = None
    ) -> tuple[Tensor, KVCache]:
        """Read the condition (see `forward`): the logits (B, K) of token 0, and the cache for `step`."""
        x = self._embed_condition(batch_size, label=label, text=text)  # (B, P, D)
        visible = None if text is None else self._visible(text)
        cache = self._allocate(x, visible=visible)
        mask = None if visible is None else _causal_mask(visible[..., : x.shape[1]])
        return self._decode(x, cache=cache, mask=mask), cache

    @torch.no_grad()
    def step(self, tokens: Tensor, *, cache: KVCache) -> Tensor:
        """Append `tokens` (B,) to the sequence in `cache`: the logits (B, K) of the next ones.

        Raises:
            IndexError: when the cache holds the inputs of all N tokens already.
        """
        index = cache.length - self.text_length  # of the token to predict
        if index >= self.num_tokens:
            raise IndexError(f"the cache is full: a picture has {self.num_tokens} tokens")
        x = self.token_embedding(tokens[:, None]) + self.position[index]  # (B, 1, D)
        mask = None if cache.visible is None else cache.visible[..., : cache.length + 1]
        return self._decode(x, cache=cache, mask=mask)

    def _decode(self, x: Tensor, *, cache: KVCache, mask: Tensor | None) -> Tensor:
        for block, keys, values in zip(self.blocks, cache.keys, cache.values, strict=True):
            x = block(x, mask=mask, cache=(keys, values), start=cache.length)
        cache.length += x.shape[1]
        return self.head(self.norm_out(x[:, -1]))

    def _allocate(self, x: Tensor, *, visible: Tensor | None) -> KVCache:
        batch_size, num_conditions, model_dim = x.shape
        length = num_conditions + self.num_tokens - 1
        shape = (len(self.blocks), batch_size, self.num_heads, length, model_dim // self.num_heads)
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        keys, values = (torch.empty(shape, dtype=dtype, device=x.device).unbind() for _ in range(2))
        return KVCache(keys=keys, values=values, visible=visible, length=0)

    def _embed_condition(self, batch_size: int, *, label: Tensor | None, text: Tensor | None) -> Tensor:
        if (0 if text is None else text.shape[1]) != self.text_length:
            raise ValueError(
                f"text of {None if text is None else tuple(text.shape)}, text_length is {self.text_length}"
            )
        if label is None:
            label = torch.full((batch_size,), self.null_label, device=self.position.device)
        x = (self.class_embedding(label) + self.position[0])[:, None]  # (B, 1, D)
        if text is None:
            return x
        return torch.cat([self.text_embedding(text) + self.text_position, x], dim=1)

    def _visible(self, text: Tensor) -> Tensor:
        """Which positions of the whole sequence may be looked at: (B, 1, 1, P + N - 1), False at text pads."""
        return F.pad(text != 0, (0, self.num_tokens), value=True)[:, None, None]


def _causal_mask(visible: Tensor) -> Tensor:
    """(B, 1, 1, S) -> (B, 1, S, S): each position sees the visible ones before it and always itself.

    Itself, because a row that sees nothing would be all -inf and its softmax NaN.
    """
    length = visible.shape[-1]
    itself = torch.eye(length, dtype=torch.bool, device=visible.device)
    return (visible & itself.new_ones(length, length).tril()) | itself
