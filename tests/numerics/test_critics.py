"""Laws of the networks that judge images and of what is done to images before: augmentation, patches, features."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor, nn

from components.models.critics import PatchDiscriminator, PerceptualLoss
from components.models.losses.adversarial import DRAWS, augment, cut_out, jitter_color, shift


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
    deeper = PatchDiscriminator(channels=8, num_layers=5).modules()
    assert [m.out_channels for m in deeper if isinstance(m, nn.Conv2d)] == [8, 16, 32, 64, 64, 64, 1]


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


def images_and_draws(samples: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.rand(samples, 3, 16, 16, dtype=torch.float64) * 2 - 1
    return images, torch.rand(samples, len(DRAWS), dtype=torch.float64)


def test_a_image_is_augmented_the_same_in_any_batch():
    images, draws = images_and_draws()
    alone = [augment(images[i : i + 1], draws=draws[i : i + 1]) for i in range(6)]
    torch.testing.assert_close(augment(images, draws=draws), torch.cat(alone), rtol=0, atol=1e-12)


def test_gradients_are_those_of_the_augmented_image():
    images, draws = images_and_draws(2)
    assert torch.autograd.gradcheck(lambda x: augment(x, draws=draws), images[:, :, :8, :8].clone().requires_grad_())


def test_every_draw_changes_the_image():
    images, draws = images_and_draws(1)
    for number in range(len(DRAWS)):
        other = draws.clone()
        other[0, number] = (other[0, number] + 0.5) % 1
        assert not torch.equal(augment(images, draws=draws), augment(images, draws=other)), DRAWS[number]


def test_draws_in_the_middle_leave_the_color_no_saturation_is_grey_and_no_contrast_is_flat():
    images, _ = images_and_draws()
    one = torch.ones(6, dtype=torch.float64)
    torch.testing.assert_close(jitter_color(images, brightness=0 * one, saturation=one, contrast=one), images)
    grey = jitter_color(images, brightness=0 * one, saturation=0 * one, contrast=one)
    torch.testing.assert_close(grey, images.mean(1, keepdim=True).expand(-1, 3, -1, -1))
    flat = jitter_color(images, brightness=0.25 * one, saturation=one, contrast=0 * one)
    torch.testing.assert_close(flat, (images.mean((1, 2, 3), keepdim=True) + 0.25).expand_as(images))


@pytest.mark.parametrize(("down", "right"), [(0, 0), (2, -1), (-2, 2)])
def test_images_move_by_whole_pixels_and_zeros_come_in(down: int, right: int):
    images, _ = images_and_draws(1)
    moved = torch.from_numpy(ndimage.shift(images, (0, 0, down, right), order=0))
    assert torch.equal(shift(images, down=torch.tensor([down]), right=torch.tensor([right])), moved)


def test_shifts_reach_an_eighth_of_the_side_each_way_and_all_are_alike():
    draws = torch.full((500, len(DRAWS)), 0.5)
    draws[:, DRAWS.index("shift_x")] = torch.arange(500) / 500
    image = torch.eye(16)[12].expand(1, 3, 16, 16)
    draws[:, DRAWS.index("cut_x")] = 0  # the mask is at the left
    columns = augment(image.expand(500, -1, -1, -1), draws=draws).mean((1, 2)).argmax(1)
    assert columns.bincount().tolist() == [0] * 10 + [100] * 5


def test_the_mask_has_half_the_sides_and_may_reach_over_the_border():
    masks = cut_out(torch.ones(2, 3, 16, 16), top=torch.tensor([4, -4]), left=torch.tensor([1, 12])) == 0
    assert torch.stack(masks[0].nonzero()[:, 1:].aminmax(dim=0)).tolist() == [[4, 1], [11, 8]]
    assert masks.sum((1, 2, 3)).tolist() == [3 * 8 * 8, 3 * 4 * 4]
