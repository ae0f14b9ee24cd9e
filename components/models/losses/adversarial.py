"""Hinge losses and the adaptive weight of VQ-GAN (Esser et al. 2021, "Taming Transformers").

Equations 4 to 7 of the paper. Shapes: B batch, h w patches, H W pixels.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, distributed


def hinge_discriminator_loss(real_logits: Tensor, *, fake_logits: Tensor) -> Tensor:
    """Hinge loss (mean relu(1 - D(x)) + mean relu(1 + D(x_hat))) / 2, (); 1.0 for constant zero logits."""
    return 0.5 * (F.relu(1 - real_logits.float()).mean() + F.relu(1 + fake_logits.float()).mean())


def generator_loss(fake_logits: Tensor) -> Tensor:
    """The generator's loss -mean D(x_hat), ()."""
    return -fake_logits.float().mean()


def adaptive_weight(nll_gradient: Tensor, *, adversarial_gradient: Tensor) -> Tensor:
    """Ratio of the norms of the two gradients (equation 7), () without gradient, in [0, 1e4].

    Args:
        nll_gradient, adversarial_gradient: gradients of reconstruction plus perceptual loss, and of `generator_loss`,
            with respect to the decoder's last layer, of the same shape.
    """
    norms = [torch.linalg.vector_norm(g.float()) for g in (nll_gradient, adversarial_gradient)]
    return (norms[0] / (norms[1] + 1e-4)).clamp(0, 1e4).detach()


class GeneratorLoss(NamedTuple):
    """The balanced sum of two losses, and the adaptive weight of the second loss."""

    loss: Tensor  # ()  nll_loss + adversarial_weight * adaptive_weight * adversarial_loss
    adaptive_weight: Tensor  # ()


def balanced_generator_loss(
    reconstruction: Tensor,
    *,
    nll_loss: Tensor,
    adversarial_loss: Tensor,
    last_layer: Tensor,
    adversarial_weight: float,
) -> GeneratorLoss:
    """`nll_loss` plus the adversarial loss times the adaptive weight.

    Each loss network is traversed backward once.

    Both gradients are taken at the pixels of `reconstruction` (B, 3, H, W), carried on from there to `last_layer` for
    the weight, and summed for `.backward()`. So the discriminator's parameters receive no gradient that the caller
    would have to zero, and the discriminator's graph stays for the discriminator's own loss:
    `hinge.backward(inputs=list(discriminator.parameters()))`.

    Args:
        reconstruction: the decoder's output, or any value on the way from there to the losses.
        nll_loss: () reconstruction plus weighted perceptual loss, a function of the reconstruction only.
        adversarial_loss: () `generator_loss` of the reconstruction.
        last_layer: the raw weight of the decoder's last layer, not the weight of a DDP wrapper.
        adversarial_weight: factor on top of the adaptive weight (0.8 as published).
    """
    (nll_pixels,) = torch.autograd.grad(nll_loss, reconstruction)
    (adversarial_pixels,) = torch.autograd.grad(adversarial_loss, reconstruction, retain_graph=True)
    nll_gradient, adversarial_gradient = (
        _mean_over_ranks(torch.autograd.grad(reconstruction, last_layer, pixels, retain_graph=True)[0])
        for pixels in (nll_pixels, adversarial_pixels)
    )
    ratio = adaptive_weight(nll_gradient, adversarial_gradient=adversarial_gradient)
    weight = adversarial_weight * ratio
    value = (nll_loss + weight * adversarial_loss).detach()
    pixels = nll_pixels.float() + weight * adversarial_pixels.float()
    linear = (reconstruction.float() * pixels).sum()  # of gradient `pixels`; the value cancels
    return GeneratorLoss(loss=linear - linear.detach() + value, adaptive_weight=ratio)


def _mean_over_ranks(gradient: Tensor) -> Tensor:
    """The gradient of the global batch: the mean over all ranks.

    A weight computed by each rank alone would make the result depend on the number of ranks.
    """
    if distributed.is_initialized():
        distributed.all_reduce(gradient)
        gradient /= distributed.get_world_size()
    return gradient
