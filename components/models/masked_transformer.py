"""Transformer over the tokens of an image, with masked tokens (MaskGIT; Chang et al. 2022, 3.1).

The same tables and blocks as the causal prior without its mask: every position sees all conditions and all tokens, and
the head says what stands behind the masked ones.

Shapes: B batch, N num_tokens, L text_length, P tokens of the conditions together, S = P + N, K codebook_size.
"""

from typing import ClassVar

import torch
from torch import Tensor

from components.models.token_network import TokenNetwork


class MaskedTransformer(TokenNetwork):
    """Distribution of every token of an image, given conditions and unmasked tokens.

    Args: see `TokenNetwork`. Row i of a table of positions belongs to token i; the class token has none.
    """

    causal: ClassVar[bool] = False

    @property
    def mask_token(self) -> int:
        """The token K in place of unknown tokens."""
        return self.codebook_size

    def forward(
        self,
        tokens: Tensor,
        *,
        label: Tensor | None = None,
        text: Tensor | None = None,
        condition: Tensor | None = None,
    ) -> Tensor:
        """Logits of every token.

        Args:
            tokens: (B, N) int64 in [0, K], K being the mask token.
            label, text, condition: see `Transformer.forward`.

        Returns:
            (B, N, K); those at tokens that are not masked mean nothing, since they see themselves.

        Raises:
            ValueError: when the shape of a condition is not the one that the model was built for.
        """
        conditions = self._embed_conditions(len(tokens), label=label, text=text, condition=condition)  # (B, P, D)
        image = self._place(self.token_embedding(tokens), 0)  # (B, N, D)
        x = self.dropout(torch.cat([conditions, image], dim=1))
        mask = self._visible(text)
        for block in self.blocks:
            x = block(x, mask=mask, rotation=self.rotation)
        return self.head(self.norm_out(x[:, self.num_conditions :]))
