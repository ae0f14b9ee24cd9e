"""Laws of differentiable augmentation."""

import itertools

import pytest
import torch

from components.models.losses.adversarial import DRAWS, augment, cut_out, jitter_color, shift


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
    mean = images.mean((1, 2, 3), keepdim=True) + 0.25
    torch.testing.assert_close(flat, mean.expand_as(images))


@pytest.mark.parametrize(("down", "right"), [(0, 0), (2, -1), (-2, 2)])
def test_images_move_by_whole_pixels_and_zeros_come_in(down: int, right: int):
    images, _ = images_and_draws(1)
    moved = shift(images, down=torch.tensor([down]), right=torch.tensor([right]))
    for row, column in itertools.product(range(16), repeat=2):
        inside = 0 <= row - down < 16 and 0 <= column - right < 16
        expected = images[0, :, row - down, column - right] if inside else torch.zeros(3, dtype=torch.float64)
        assert torch.equal(moved[0, :, row, column], expected)


def test_shifts_reach_an_eighth_of_the_side_each_way_and_all_are_alike():
    draws = torch.full((500, len(DRAWS)), 0.5)
    draws[:, DRAWS.index("shift_x")] = torch.arange(500) / 500
    image = torch.zeros(1, 3, 16, 16)
    image[..., 12] = 1
    draws[:, DRAWS.index("cut_x")] = 0  # the mask is at the left
    columns = augment(image.expand(500, -1, -1, -1), draws=draws).mean((1, 2)).argmax(1)
    assert columns.bincount().tolist() == [0] * 10 + [100] * 5


def test_the_mask_has_half_the_sides_and_may_reach_over_the_border():
    masks = cut_out(torch.ones(2, 3, 16, 16), top=torch.tensor([4, -4]), left=torch.tensor([1, 12])) == 0
    assert masks[0].nonzero()[:, 1:].aminmax(dim=0).min.tolist() == [4, 1]
    assert masks[0].nonzero()[:, 1:].aminmax(dim=0).max.tolist() == [11, 8]
    assert masks.sum((1, 2, 3)).tolist() == [3 * 8 * 8, 3 * 4 * 4]
