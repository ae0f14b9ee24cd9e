"""Adversarial losses: hinge and adaptive weight of VQ-GAN, and augmentation of judged images.
Sources: Esser et al. 2021, "Taming Transformers", equations 4 to 7; Zhao et al. 2020, "Differentiable Augmentation for
Data-Efficient GAN Training". Shapes: B batch, h w patches, H W pixels."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, distributed

from components.models.devices import to_device


def hinge_discriminator_loss(real_logits: Tensor, *, fake_logits: Tensor) -> Tensor:
    """Hinge loss (mean relu(1 - D(x)) + mean relu(1 + D(x_hat))) / 2, (); 1.0 for constant zero logits."""
    return 0.5 * (F.relu(1 - real_logits.float()).mean() + F.relu(1 + fake_logits.float()).mean())


def generator_loss(fake_logits: Tensor) -> Tensor:
    """The generator's loss -mean D(x_hat), ()."""
    return -fake_logits.float().mean()


def adaptive_weight(nll_gradient: Tensor, *, adversarial_gradient: Tensor) -> Tensor:
    """Ratio of the norms of the two gradients (equation 7), () without gradient, in [0, 1e4].
    They are those of reconstruction plus perceptual loss and of `generator_loss` at the decoder's last layer."""
    norms = [torch.linalg.vector_norm(g.float()) for g in (nll_gradient, adversarial_gradient)]
    return (norms[0] / (norms[1] + 1e-4)).clamp(0, 1e4).detach()


class GeneratorLoss(NamedTuple):
    """The balanced sum of two losses, and the adaptive weight of the second loss."""

    loss: Tensor  # ()  nll_loss + adversarial_weight * adaptive_weight * adversarial_loss
    adaptive_weight: Tensor  # ()


def balanced_generator_loss(
    reconstruction: Tensor, *, nll_loss: Tensor, adversarial_loss: Tensor, last_layer: Tensor, adversarial_weight: float
) -> GeneratorLoss:
    """`nll_loss` plus the adversarial loss times the adaptive weight, one backward pass of each network.
    Both gradients are taken at the pixels of `reconstruction` (B, 3, H, W), carried on to `last_layer`, the raw weight
    of the decoder's last layer, and summed for `.backward()`. So the discriminator's parameters receive no gradient,
    and its graph stays for its own loss: `hinge.backward(inputs=list(discriminator.parameters()))`. `nll_loss` () is
    reconstruction plus weighted perceptual loss, `adversarial_loss` () the `generator_loss`, both functions of the
    reconstruction alone; `adversarial_weight` is a factor on top (as published 0.8)."""
    (nll_pixels,) = torch.autograd.grad(nll_loss, reconstruction)
    (adversarial_pixels,) = torch.autograd.grad(adversarial_loss, reconstruction, retain_graph=True)
    gradients = [
        torch.autograd.grad(reconstruction, last_layer, pixels, retain_graph=True)[0]
        for pixels in (nll_pixels, adversarial_pixels)
    ]
    for gradient in gradients if distributed.is_initialized() else ():
        distributed.all_reduce(gradient)  # a weight of each rank alone would let the result depend on their number
        gradient /= distributed.get_world_size()
    ratio = adaptive_weight(gradients[0], adversarial_gradient=gradients[1])
    weight = adversarial_weight * ratio
    value = (nll_loss + weight * adversarial_loss).detach()
    pixels = nll_pixels.float() + weight * adversarial_pixels.float()
    linear = (reconstruction.float() * pixels).sum()  # of gradient `pixels`; the value cancels
    return GeneratorLoss(loss=linear - linear.detach() + value, adaptive_weight=ratio)


DRAWS = ("brightness", "saturation", "contrast", "shift_y", "shift_x", "cut_y", "cut_x")  # of each image
SHIFT, CUT = 1 / 8, 1 / 2  # of the side


def augment(image: Tensor, *, draws: Tensor) -> Tensor:
    """Augment images (B, 3, H, W) in [-1, 1] with gradient, each by a row of draws alone.
    The discriminator sees real and generated images augmented alike, in all of its losses: so it cannot learn a small
    set of images by heart, and the augmentation does not appear in generated images. As published: color, translation
    by up to an eighth of the side, cutout of half the side. `draws` (B, 7) are uniform in [0, 1), in the order of
    DRAWS, on the host."""
    shift_y, shift_x = draws[:, 3], draws[:, 4]
    brightness, saturation, contrast, _, _, cut_y, cut_x = to_device(draws, image.device).unbind(1)
    image = jitter_color(image, brightness=brightness - 0.5, saturation=2 * saturation, contrast=contrast + 0.5)
    # Of uniform draws, whole shifts and first rows of a mask with its center in the image.
    shifts, cuts = (zip(each, image.shape[2:], strict=True) for each in ((shift_y, shift_x), (cut_y, cut_x)))
    down, right = ((draw * (2 * _largest(side) + 1)).long() - _largest(side) for draw, side in shifts)
    top, left = ((draw * side).long() - int(side * CUT) // 2 for draw, side in cuts)
    return cut_out(shift(image, down=down, right=right), top=top, left=left)


def jitter_color(image: Tensor, *, brightness: Tensor, saturation: Tensor, contrast: Tensor) -> Tensor:
    """Add `brightness`, then scale the distance to each pixel's grey and to the image's mean; all (B,)."""
    image = image + brightness[:, None, None, None]
    grey = image.mean(dim=1, keepdim=True)
    image = grey + (image - grey) * saturation[:, None, None, None]
    mean = image.mean(dim=(1, 2, 3), keepdim=True)
    return mean + (image - mean) * contrast[:, None, None, None]


def shift(image: Tensor, *, down: Tensor, right: Tensor) -> Tensor:
    """Move each image by whole pixels (B,) int64 on the host, at most an eighth of the side; fill with 0."""
    height, width = image.shape[2:]
    pad_y, pad_x = _largest(height), _largest(width)
    padded = F.pad(image, (pad_x, pad_x, pad_y, pad_y))
    places = zip(padded.unbind(), (pad_y - down).tolist(), (pad_x - right).tolist(), strict=True)
    return torch.stack([each[:, top : top + height, left : left + width] for each, top, left in places])


def cut_out(image: Tensor, *, top: Tensor, left: Tensor) -> Tensor:
    """Set a rectangle of half the sides to 0 from (top, left), (B,) int64, cut at the image's border."""
    inside = []
    for start, side in ((top, image.shape[2]), (left, image.shape[3])):
        place = torch.arange(side, device=image.device)
        inside.append((place >= start[:, None]) & (place < start[:, None] + int(side * CUT)))
    mask = inside[0][:, None, :, None] & inside[1][:, None, None, :]  # (B, 1, H, W)
    return image.masked_fill(mask, 0)


def _largest(side: int) -> int:
    return int(side * SHIFT + 0.5)
