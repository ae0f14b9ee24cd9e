"""Contrastive loss of pairs of image and text (Radford et al. 2021, figure 3).

Shapes: B batch over all ranks, E embedding_dim.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def contrastive_loss(image: Tensor, text: Tensor, *, log_scale: Tensor) -> Tensor:
    """Symmetric cross-entropy over the batch, () in nats, fp32: log B for uninformative embeddings.

    Each image chooses among the texts of the batch, and each text among the images.

    Args:
        image, text: (B, E) of length 1; row i of `image` belongs to row i of `text`.
        log_scale: (), the logarithm of the factor of the cosine similarities.
    """
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

    The gradients are all that a network must know of the other samples: with the gradients, the backward pass can go
    through a batch in parts, each by `along_gradient` (Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size
    under Memory Limited Setup").
    """
    leaves = [tensor.detach().requires_grad_() for tensor in (image, text, log_scale)]
    with torch.enable_grad():
        loss = contrastive_loss(leaves[0], leaves[1], log_scale=leaves[2])
        return ContrastiveGradients(loss.detach(), *torch.autograd.grad(loss, leaves))


def along_gradient(value: Tensor, gradient: Tensor) -> Tensor:
    """A scalar with the gradient `gradient` at `value`; both of the same shape."""
    return (value.float() * gradient).sum()
