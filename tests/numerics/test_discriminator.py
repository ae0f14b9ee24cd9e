"""Laws of the patch discriminator."""

import torch
from torch import nn

from components.models.critics import PatchDiscriminator


def test_one_logit_has_the_published_receptive_field_of_70_pixels():
    discriminator = PatchDiscriminator(channels=4)
    for module in discriminator.modules():  # a norm looks at the whole image, the receptive field is the convolutions'
        if isinstance(module, nn.GroupNorm):
            module.forward = lambda x: x
    image = torch.randn(1, 3, 160, 160, requires_grad=True)
    logits = discriminator(image)
    (gradient,) = torch.autograd.grad(logits[0, 0, 9, 9], image)
    rows = gradient.abs().sum(dim=(0, 1, 3)).nonzero().flatten()
    assert int(rows[-1] - rows[0]) + 1 == 70


def test_a_image_is_judged_the_same_in_any_batch():
    discriminator = PatchDiscriminator(channels=8)
    images = torch.rand(4, 3, 32, 32) * 2 - 1
    alone = torch.cat([discriminator(image[None]) for image in images])
    torch.testing.assert_close(discriminator(images), alone, atol=1e-6, rtol=0)


def test_convolutions_start_from_the_published_distribution():
    torch.manual_seed(0)
    weights = [m.weight for m in PatchDiscriminator(channels=32).modules() if isinstance(m, nn.Conv2d)]
    for weight in weights[1:4]:
        torch.testing.assert_close(weight.std().item(), 0.02, rtol=0.05, atol=0)
        assert abs(weight.mean().item()) < 1e-3


def test_the_widths_double_up_to_eight_times():
    discriminator = PatchDiscriminator(channels=8, num_layers=5)
    widths = [m.out_channels for m in discriminator.modules() if isinstance(m, nn.Conv2d)]
    assert widths == [8, 16, 32, 64, 64, 64, 1]
