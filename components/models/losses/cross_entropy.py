"""Cross-entropies: likelihood of tokens under a prior, and the contrastive loss of pairs.
Shapes: B batch, N tokens an image, K codebook_size, L text_length, V vocab_size, E embedding_dim."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor


def contrastive_loss(image: Tensor, text: Tensor, *, log_scale: Tensor) -> Tensor:
    """Symmetric cross-entropy over the batch, () in nats, fp32: log B for uninformative embeddings.
    Each image chooses among the texts of the batch, and each text among the images; row i of `image` (B, E), of length
    1, belongs to row i of `text`. `log_scale` () is the logarithm of the factor of the cosine similarities."""
    logits = log_scale.float().exp() * image.float() @ text.float().T  # (B, B), a row for each image
    own = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


class ContrastiveGradients(NamedTuple):
    """The loss of a whole batch and the gradients of the loss, all without graph."""

    loss: Tensor  # ()
    image: Tensor  # (B, E)
    text: Tensor  # (B, E)
    log_scale: Tensor  # ()


def contrastive_gradients(image: Tensor, text: Tensor, *, log_scale: Tensor) -> ContrastiveGradients:
    """The loss of embeddings (B, E) and the gradients at the embeddings, detached from any graph.
    With them the backward pass can go through a batch in parts, each by `along_gradient` (Gao et al. 2021, "Scaling
    Deep Contrastive Learning Batch Size under Memory Limited Setup")."""
    leaves = [tensor.detach().requires_grad_() for tensor in (image, text, log_scale)]
    with torch.enable_grad():
        loss = contrastive_loss(leaves[0], leaves[1], log_scale=leaves[2])
        return ContrastiveGradients(loss.detach(), *torch.autograd.grad(loss, leaves))


def along_gradient(value: Tensor, gradient: Tensor) -> Tensor:
    """A scalar with the gradient `gradient` at `value`; both of the same shape."""
    return (value.float() * gradient).sum()


def token_loss(logits: Tensor, *, tokens: Tensor) -> Tensor:
    """Mean negative log likelihood in nats a token, () in fp32; log K for a uniform model.
    `logits` are (B, N, K), logits[:, i] from tokens before i only; `tokens` (B, N) int64 in [0, K)."""
    return F.cross_entropy(rearrange(logits, "b n k -> (b n) k").float(), tokens.flatten())


def text_nats(logits: Tensor, *, text: Tensor) -> tuple[Tensor, Tensor]:
    """Negative log likelihood of each text in nats, and the number of tokens, both (B,) in fp32.
    `logits` are (B, L - 1, V), logits[:, i] of text token i + 1, from the text tokens up to i; `text` is (B, L) int64
    in [0, V). The first token is given; pads (0) do not count, in nats or in number."""
    targets = text[:, 1:]
    nats = F.cross_entropy(rearrange(logits, "b l v -> b v l").float(), targets, ignore_index=0, reduction="none")
    return nats.sum(dim=1), (targets != 0).sum(dim=1).float()


def text_loss(logits: Tensor, *, text: Tensor) -> Tensor:
    """Mean over the batch of each text's nats a token, () in fp32; a text of pads alone counts as 0.
    Each text is averaged over its own tokens, so that a batch taken in parts has the same loss. See `text_nats`."""
    nats, count = text_nats(logits, text=text)
    return (nats / count.clamp(min=1)).mean()


def masked_token_loss(logits: Tensor, *, tokens: Tensor, masked: Tensor, label_smoothing: float) -> Tensor:
    """Mean over the batch of each image's cross-entropy a masked token, () (Chang et al. 2022, eq. 1).
    Without smoothing, and with the number of masked tokens drawn evenly from 1..N, the loss is an upper bound of the
    nats a token when tokens are drawn one by one in random order (Hoogeboom et al. 2022, "Autoregressive Diffusion
    Models", section 3). `logits` are (B, N, K); `tokens` (B, N) int64 in [0, K), the true ones; `masked` (B, N) bool,
    at least one in each row; `label_smoothing` is the share of the target spread over all K."""
    logits = rearrange(logits, "b n k -> b k n").float()
    nats = F.cross_entropy(logits, tokens, label_smoothing=label_smoothing, reduction="none")
    return ((nats * masked).sum(dim=1) / masked.sum(dim=1)).mean()
