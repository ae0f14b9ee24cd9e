"""Likelihood of tokens under the prior.

Shapes: B batch, N tokens an image, K codebook_size, L text_length, V vocab_size.
"""

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor


def token_loss(logits: Tensor, *, tokens: Tensor) -> Tensor:
    """Mean negative log likelihood in nats a token, () in fp32; log K for a uniform model.

    Args:
        logits: (B, N, K), logits[:, i] from tokens before i only.
        tokens: (B, N) int64 in [0, K).
    """
    return F.cross_entropy(rearrange(logits, "b n k -> (b n) k").float(), tokens.flatten())


def text_nats(logits: Tensor, *, text: Tensor) -> tuple[Tensor, Tensor]:
    """Negative log likelihood of each text in nats, and the number of tokens, both (B,) in fp32.

    Args:
        logits: (B, L - 1, V), logits[:, i] of text token i + 1, from the text tokens up to i.
        text: (B, L) int64 in [0, V). The first token is given; pads (0) do not count, in nats or in number.
    """
    targets = text[:, 1:]
    nats = F.cross_entropy(rearrange(logits, "b l v -> b v l").float(), targets, ignore_index=0, reduction="none")
    return nats.sum(dim=1), (targets != 0).sum(dim=1).float()


def text_loss(logits: Tensor, *, text: Tensor) -> Tensor:
    """Mean over the batch of each text's nats a token, () in fp32; a text of pads alone counts as 0.

    Each text is averaged over its own tokens, so that a batch taken in parts has the same loss. See `text_nats`.
    """
    nats, count = text_nats(logits, text=text)
    return (nats / count.clamp(min=1)).mean()


def masked_token_loss(logits: Tensor, *, tokens: Tensor, masked: Tensor, label_smoothing: float) -> Tensor:
    """Mean over the batch of each image's cross-entropy a masked token, () in fp32.

    Source: Chang et al. 2022, equation 1.

    Each image is averaged over its own masked tokens. Without smoothing, and with the number of masked tokens drawn
    evenly from 1..N, the loss is an upper bound of the nats a token when tokens are drawn one by one in random order
    (Hoogeboom et al. 2022, "Autoregressive Diffusion Models", section 3).

    Args:
        logits: (B, N, K), from the tokens that are not masked.
        tokens: (B, N) int64 in [0, K), the true ones.
        masked: (B, N) bool, at least one in each row.
        label_smoothing: share of the target that is spread evenly over all K.
    """
    nats = F.cross_entropy(
        rearrange(logits, "b n k -> b k n").float(), tokens, label_smoothing=label_smoothing, reduction="none"
    )
    return ((nats * masked).sum(dim=1) / masked.sum(dim=1)).mean()
