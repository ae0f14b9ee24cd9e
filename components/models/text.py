"""Text encoder: a small bidirectional pre-norm transformer over BPE ids (Vaswani et al., 2017).
Pre-norm as in GPT-2. Shapes: B batch, L text length, N context_length, D model_dim. Padding is id 0 and stands only at
the end of a row, which has at least one real token (the empty text is begin and end)."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from components.models.layers import NetworkBlock, attend

PAD_ID = 0


class EncodedText(NamedTuple):
    """States of a batch of texts: one for each token, and one for the whole text."""

    states: Tensor  # (B, L, D)  one state a token; those of padding mean nothing
    pooled: Tensor  # (B, D)     the state of the last token that is not padding


class TextTransformer(nn.Module):
    """Encode token ids; padding is never attended to, so the amount of padding changes nothing.
    With `learned_padding` every text is padded to N tokens, each pad has a learned vector of its position, all are
    attended to and the last is pooled (as in the code of Nichol et al., 2022): then L of the encoded text is N. The
    model_dim is a multiple of num_heads."""

    def __init__(
        self,
        *,
        vocab_size: int,
        context_length: int,
        model_dim: int,
        num_layers: int,
        num_heads: int,
        learned_padding: bool = False,
    ) -> None:
        super().__init__()
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
            text = F.pad(text, (0, context_length - length), value=PAD_ID)
            x = self.token_embedding(text) + self.position_embedding
            x = torch.where((text == PAD_ID)[..., None], self.padding_embedding, x)
        for block in self.blocks:
            x = block(x, mask)
        states = self.norm(x)
        last = present.sum(1) - 1  # (B,)
        return EncodedText(states, states[torch.arange(text.shape[0], device=text.device), last])

    def visible(self, text: Tensor) -> Tensor:
        """Mask of the encoded tokens open to attention, (B, L) bool."""
        if self.padding_embedding is None:
            return text != PAD_ID
        return torch.ones(len(text), len(self.position_embedding), dtype=torch.bool, device=text.device)


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
