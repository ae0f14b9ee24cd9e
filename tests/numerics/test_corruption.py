"""Laws of what happens to an upsampler's low-resolution condition."""

import pytest
import torch

from components.models.diffusion.corruption import augment_low_res, downsample, quantize_8_bit, upsample
from components.models.diffusion.schedule import make_schedule

SCHEDULE = make_schedule("linear", num_train_timesteps=100)


@pytest.mark.parametrize("size", [16, 8, 4])
def test_downsampling_never_aliases(size):
    """The finest checkerboard turns gray; interpolation without antialiasing turns it into black or white."""
    checkerboard = ((torch.arange(32)[:, None] + torch.arange(32)) % 2 * 2.0 - 1).expand(1, 3, 32, 32)
    torch.testing.assert_close(downsample(checkerboard, size), torch.zeros(1, 3, size, size))


def test_resizing_keeps_flat_color_and_means_of_areas():
    flat = torch.full((1, 3, 8, 8), 0.3)
    torch.testing.assert_close(upsample(flat, 32), torch.full((1, 3, 32, 32), 0.3))
    image = torch.randn(1, 3, 8, 8)
    torch.testing.assert_close(downsample(image, 2).mean(), image.mean())
    torch.testing.assert_close(downsample(image, 4)[0, 0, 1, 2], image[0, 0, 2:4, 4:6].mean())


def test_upsampling_keeps_pixel_centers_where_they_are():
    ramp = (torch.arange(8.0) + 0.5).expand(1, 1, 8, 8)
    torch.testing.assert_close(upsample(ramp, 16)[0, 0, 8, 1:-1], (torch.arange(16.0)[1:-1] + 0.5) / 2)


def test_noise_level_0_leaves_the_condition_and_level_n_is_n_noising_steps():
    low_res, noise = torch.randn(2, 3, 3, 4, 4).unbind()
    augmented = augment_low_res(SCHEDULE, low_res, noise, torch.tensor([0, 1, 60]))
    assert torch.equal(augmented[0], low_res[0])
    stepped = SCHEDULE.add_noise(low_res[1:], noise[1:], torch.tensor([0, 59]))
    torch.testing.assert_close(augmented[1:], stepped)  # each sample at its own level


def test_a_higher_noise_level_hides_more():
    low_res, noise = torch.randn(2, 1, 3, 32, 32).unbind()
    levels = torch.tensor([0, 10, 30, 60, 99])
    augmented = augment_low_res(SCHEDULE, low_res.expand(5, -1, -1, -1), noise, levels).flatten(1)
    similarity = torch.cosine_similarity(augmented, low_res.flatten(1))
    assert (similarity.diff() < 0).all()


def test_stored_images_pass_8_bit_rounding_unchanged():
    stored = torch.arange(256).reshape(1, 1, 16, 16) / 127.5 - 1
    torch.testing.assert_close(quantize_8_bit(stored), stored)


def test_8_bit_rounding_goes_to_the_nearest_stored_value_and_into_the_range():
    image = torch.rand(1, 3, 32, 32) * 2 - 1
    assert (quantize_8_bit(image) - image).abs().max() <= 0.5 / 127.5 + 1e-6
    assert len(quantize_8_bit(image).unique()) <= 256
    assert quantize_8_bit(torch.tensor([-3.0, 3.0])).tolist() == [-1, 1]
