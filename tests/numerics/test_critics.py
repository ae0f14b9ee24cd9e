"""Laws of the networks that judge reconstructions: patch discriminator and perceptual distance."""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from components.models.critics import PatchDiscriminator, PerceptualLoss


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


def test_convolutions_start_from_the_published_distribution_and_their_widths_double_up_to_eight_times():
    weights = [m.weight for m in PatchDiscriminator(channels=32).modules() if isinstance(m, nn.Conv2d)]
    for weight in weights[1:4]:
        torch.testing.assert_close(weight.std().item(), 0.02, rtol=0.05, atol=0)
        assert abs(weight.mean().item()) < 1e-3
    discriminator = PatchDiscriminator(channels=8, num_layers=5)
    widths = [m.out_channels for m in discriminator.modules() if isinstance(m, nn.Conv2d)]
    assert widths == [8, 16, 32, 64, 64, 64, 1]


class Features(nn.Module):
    """Two feature maps of a small real network; its dropout shows whether it is in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_1 = nn.Conv2d(3, 6, 3, padding=1)
        self.conv_2 = nn.Conv2d(6, 4, 3, stride=2, padding=1)
        self.dropout = nn.Dropout(0.5)

    def forward(self, image: Tensor) -> list[Tensor]:
        first = F.relu(self.conv_1(image))
        return [first, self.dropout(F.relu(self.conv_2(first)))]


def test_the_distance_is_that_of_its_formula_pixel_by_pixel():
    features = Features()
    weights = [torch.rand(6), torch.rand(4)]
    distance = PerceptualLoss(features, layer_weights=weights)
    a, b = torch.rand(2, 2, 3, 6, 6).unbind()
    expected = torch.zeros(2)
    for f, g, weight in zip(features(a), features(b), weights, strict=True):
        for i, j in itertools.product(range(f.shape[2]), range(f.shape[3])):
            u, v = (x[:, :, i, j] / (x[:, :, i, j].norm(dim=1, keepdim=True) + 1e-10) for x in (f, g))
            expected += ((u - v) ** 2 @ weight) / f[0, 0].numel()
    torch.testing.assert_close(distance(a, b), expected)
    ones = PerceptualLoss(features, layer_weights=[torch.ones(6), torch.ones(4)])
    torch.testing.assert_close(PerceptualLoss(features)(a, b), ones(a, b))


def test_a_image_has_distance_zero_from_itself_and_the_distance_is_symmetric():
    distance = PerceptualLoss(Features())
    a, b = torch.rand(2, 2, 3, 6, 6).unbind()
    assert torch.equal(distance(a, a), torch.zeros(2))
    torch.testing.assert_close(distance(a, b), distance(b, a))


def test_the_feature_network_stays_frozen_and_in_eval_mode():
    distance = PerceptualLoss(Features()).train()
    assert not distance.features.dropout.training
    assert not any(p.requires_grad for p in distance.parameters())
    image = torch.rand(1, 3, 6, 6, requires_grad=True)
    distance(image, torch.rand(1, 3, 6, 6)).sum().backward()
    assert image.grad.abs().sum() > 0


def test_dead_pixels_give_a_finite_gradient():
    """The square root of a sum of squares has none where every channel is zero."""
    image = torch.rand(1, 3, 6, 6, requires_grad=True)
    features = nn.Module()
    features.forward = lambda image: [image * 0.0]
    PerceptualLoss(features)(image, torch.rand(1, 3, 6, 6)).sum().backward()
    assert image.grad.isfinite().all()
