"""The causal and the masked transformer over the tokens of an image, after those of conditions.
Sources: decoder-only and pre-norm, Esser et al. 2021 and Radford et al. 2019; the text in the same sequence with a head
of its own, DALL-E (Ramesh et al. 2021, 2.2); masked tokens, MaskGIT (Chang et al. 2022, 3.1).
Shapes: B batch, N num_tokens, L text_length, P tokens of the conditions together, S sequence, D model_dim, H heads, E
head_dim, K codebook_size, V vocab_size."""

from dataclasses import replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from components.models.devices import autocast_dtype
from components.models.layers import logits_of
from components.models.token_network import KVCache, TokenNetwork, part_of


class JointLogits(NamedTuple):
    """Logits of a joint model of text and image tokens, from a single pass over the sequence."""

    tokens: Tensor  # (B, N, K)  [:, i] from the conditions and the tokens before i
    text: Tensor  # (B, L - 1, V)  [:, i], of text token i + 1, from the text tokens up to i


class Transformer(TokenNetwork):
    """Prior over the tokens of an image, given a class, a text, another image, several conditions or none.

    Args:
        predict_text: whether there is a head for the text tokens; needs vocab_size.
        settings: see `TokenNetwork`. Row i of a table of positions is added to the input that predicts token i: no row
            is left unused, and the class token, if any, has one. Rotations go by the place of the input token itself.

    Raises ValueError as `TokenNetwork`, or when there is no text to predict."""

    causal: ClassVar[bool] = True

    def __init__(self, *, predict_text: bool = False, **settings: Any) -> None:
        super().__init__(**settings)
        if predict_text:
            if not self.text_length:
                raise ValueError("predict_text needs vocab_size and text_length")
            self.text_head = nn.Linear(self.head.in_features, self.text_embedding.num_embeddings, bias=False)
            nn.init.normal_(self.text_head.weight, std=0.02)

    def forward(self, tokens: Tensor, *, with_text: bool = False, **conditions: Tensor | None) -> Tensor | JointLogits:
        """Teacher-forced logits.

        Args:
            tokens: (B, N) int64 in [0, K).
            label: (B,) int64 in [0, num_classes], num_classes being the null label; None stands for the null label.
            text: (B, L) int64, pads (0) at the end; given if and only if the model has a text table.
            condition: (B, M) int64 in [0, condition_codebook_size], the last being the null token; given if and only if
                the model has a table for it.
            with_text: return `JointLogits`, for a model that predicts text; otherwise those of the tokens alone.

        Returns (B, N, K), logits[:, i] from the conditions and the tokens before i. Raises ValueError when the shape of
        a condition is not the one that the model was built for."""
        before = self._embed_conditions(tokens.shape[0], **conditions)  # (B, P, D)
        image = self._place(self.token_embedding(tokens[:, :-1]), int(self.class_token))  # (B, N - 1, D)
        x = self.dropout(torch.cat([before, image], dim=1))
        visible = self._visible(conditions.get("text"))
        mask = None if visible is None else _causal_mask(visible)
        rotation = self._rotation(0, x.shape[1])
        for block in self.blocks:
            x = block(x, mask=mask, rotation=rotation)
        logits = logits_of(self.head, self.norm_out(x[:, self.num_conditions - 1 :]))
        if not with_text:
            return logits
        return JointLogits(logits, logits_of(self.text_head, self.norm_out(x[:, : self.text_length - 1])))

    @torch.no_grad()
    def start(
        self,
        batch_size: int,
        *,
        tokens: Tensor | None = None,
        cache: KVCache | None = None,
        **conditions: Tensor | None,
    ) -> tuple[Tensor, KVCache]:
        """Read the conditions (see `forward`) and any first n < N `tokens` (B, n).

        Args:
            cache: of an earlier batch of this size, to be written over; None: a new one.

        Returns the logits (B, K) of token n, and the cache for `step`."""
        x = self._embed_conditions(batch_size, **conditions)  # (B, P, D)
        visible = self._visible(conditions.get("text"))
        if cache is None:
            length = self.num_conditions + self.num_tokens - 1
            shape = (len(self.blocks), batch_size, self.num_heads, length, x.shape[2] // self.num_heads)
            dtype = autocast_dtype(x.device) or x.dtype
            keys, values = (torch.zeros(shape, dtype=dtype, device=x.device).unbind() for _ in range(2))
            cache = KVCache(keys=keys, values=values, visible=visible, length=0)
        cache = replace(cache, visible=visible)
        if tokens is not None:
            x = torch.cat([x, self._place(self.token_embedding(tokens), int(self.class_token))], dim=1)  # (B, P + n, D)
        cache.length = x.shape[1]
        mask = None if visible is None else _causal_mask(visible[..., : cache.length])
        return self._through(x, 0, cache=cache, mask=mask), cache

    @torch.no_grad()
    def step(self, tokens: Tensor, *, cache: KVCache) -> Tensor:
        """Append `tokens` (B,) to the sequence in `cache` and return the next logits (B, K).
        Raises IndexError when the cache holds the inputs of all N tokens already."""
        index = cache.length - self.num_conditions + 1  # of the token to predict
        if index >= self.num_tokens:
            raise IndexError(f"the cache is full: an image has {self.num_tokens} tokens")
        x = self._place(self.token_embedding(tokens[:, None]), index - int(not self.class_token))  # (B, 1, D)
        start, cache.length = cache.length, cache.length + 1
        mask = None if cache.visible is None else cache.visible[..., : cache.length]
        return self._through(x, start, cache=cache, mask=mask)

    @torch.no_grad()
    def step_at(self, tokens: Tensor, position: Tensor, *, cache: KVCache) -> Tensor:
        """Append tokens at a `position` () int64 known to the device alone; otherwise like `step`.
        No shape and no number of the host depends on the position, so one compiled step serves all of them. It looks at
        the whole cache through a mask, and neither reads nor moves `cache.length`."""
        row = position - self.num_conditions + int(self.class_token)
        x = self._place(self.token_embedding(tokens[:, None]), row)  # (B, 1, D)
        filled = torch.arange(cache.keys[0].shape[2], device=x.device) <= position  # (whole sequence,)
        mask = filled[None] if cache.visible is None else filled & cache.visible
        return self._through(x, position, cache=cache, mask=mask)

    def _through(self, x: Tensor, start: int | Tensor, *, cache: KVCache, mask: Tensor | None) -> Tensor:
        rotation = self._rotation(start, x.shape[1])
        for block, keys, values in zip(self.blocks, cache.keys, cache.values, strict=True):
            x = block(x, mask=mask, rotation=rotation, cache=(keys, values), start=start)
        return logits_of(self.head, self.norm_out(x[:, -1]))

    def _rotation(self, start: int | Tensor, length: int) -> Tensor | None:
        return None if self.rotation is None else part_of(self.rotation, start, length)


def _causal_mask(visible: Tensor) -> Tensor:
    """Causal mask (B, 1, 1, S) -> (B, 1, S, S), with the own position, lest a softmax over none be NaN."""
    length = visible.shape[-1]
    itself = torch.eye(length, dtype=torch.bool, device=visible.device)
    return (visible & itself.new_ones(length, length).tril()) | itself


class MaskedTransformer(TokenNetwork):
    """Distribution of every token of an image, given conditions and unmasked tokens.
    Without the causal mask every position sees all conditions and all tokens, and the head says what stands behind the
    masked ones. Row i of a table of positions belongs to token i; the class token has none."""

    causal: ClassVar[bool] = False

    @property
    def mask_token(self) -> int:
        """The token K in place of unknown tokens."""
        return self.codebook_size

    def forward(self, tokens: Tensor, **conditions: Tensor | None) -> Tensor:
        """Logits (B, N, K) of tokens (B, N) int64 in [0, K], K being the mask token.
        Those at tokens that are not masked mean nothing, since they see themselves. Conditions as in `Transformer`."""
        before = self._embed_conditions(tokens.shape[0], **conditions)  # (B, P, D)
        image = self._place(self.token_embedding(tokens), 0)  # (B, N, D)
        x = self.dropout(torch.cat([before, image], dim=1))
        mask = self._visible(conditions.get("text"))
        for block in self.blocks:
            x = block(x, mask=mask, rotation=self.rotation)
        return logits_of(self.head, self.norm_out(x[:, self.num_conditions :]))
