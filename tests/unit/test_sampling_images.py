"""Laws of images between files, bytes and [-1, 1]."""

import io

import numpy as np
import pytest
import torch
from einops import repeat
from PIL import ExifTags, Image

from components.models.diffusion.corruption import from_levels, to_levels
from components.sampling.image_files import (
    MAX_PIXELS,
    base64_png,
    decode_image,
    encode_png,
    enlarged,
    open_given_image,
    open_image,
    to_mask,
    to_rgb,
)
from components.sampling.images import from_uint8, levels_to_uint8, read_image, to_uint8
from components.serving.uploads import read_given
from components.training.batches import png_grid
from tests.unit.test_data_hostile import png_of

LEVELS = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
RANDOM = np.random.default_rng(0).integers(0, 256, (6, 5, 7, 3), dtype=np.uint8)


def test_images_span_minus_one_to_one_exactly_with_channels_last_in_memory() -> None:
    image = from_uint8(LEVELS)
    assert image.shape == (1, 3, 16, 16)
    assert image.is_contiguous(memory_format=torch.channels_last)
    assert image[0, 1, 15, 14] == torch.tensor(254) / 127.5 - 1
    assert (image.min(), image.max()) == (-1, 1)
    assert torch.equal(from_uint8(torch.from_numpy(LEVELS[0])), image[0])


def test_every_level_comes_back_by_every_way() -> None:
    """Of bytes, of whole numbers with colors first (as pixel models have them), and rounded to whole numbers."""
    image, levels = from_uint8(LEVELS), torch.from_numpy(LEVELS).permute(0, 3, 1, 2).long()
    np.testing.assert_array_equal(to_uint8(image), LEVELS)
    assert torch.equal(from_levels(levels), image)
    assert torch.equal(to_levels(image).round().long(), levels)


def test_levels_are_rounded_and_what_lies_beyond_goes_to_the_nearer_end() -> None:
    near = torch.tensor([-9.0, -0.4, 0.6, 99.4, 254.6, 400.0]).reshape(1, 1, 1, 6)
    expected = np.array([0, 0, 1, 99, 255, 255]).reshape(1, 1, 6, 1).repeat(3, axis=3)
    for levels in (near, near.expand(1, 3, 1, 6)):  # a gray channel is all three
        np.testing.assert_array_equal(levels_to_uint8(levels), expected)
        for image in (from_levels(levels), from_levels(levels).clamp(-1, 1)):  # before or after is the same
            np.testing.assert_array_equal(to_uint8(image), expected)
    assert to_uint8(torch.ones(1, 3, 2, 2, dtype=torch.bfloat16, requires_grad=True)).min() == 255


def test_a_png_holds_the_pixels_whether_optimized_or_not_and_equal_pixels_give_equal_bytes() -> None:
    plain, smaller = encode_png(RANDOM[0]), encode_png(RANDOM[0], optimize=True)
    for data in (plain, smaller):
        np.testing.assert_array_equal(np.asarray(open_image(data)), RANDOM[0])
    assert plain == encode_png(Image.fromarray(RANDOM[0])) == encode_png(RANDOM[0].copy(order="F"))
    assert base64_png(RANDOM[0]).startswith("iVBORw0KGgo")


def test_enlarging_by_a_whole_factor_repeats_pixels() -> None:
    for factor in (1, 2, 3, 7, 16, 64):
        wanted = repeat(RANDOM[0], "h w c -> (h fh) (w fw) c", fh=factor, fw=factor)
        np.testing.assert_array_equal(enlarged(RANDOM[0], height=5 * factor, width=7 * factor), wanted)


def test_a_preview_shows_images_row_by_row_and_small_ones_larger() -> None:
    shown = np.asarray(open_image(png_grid(from_uint8(RANDOM), columns=3)))
    assert shown.shape == (2 * 5 * 9, 3 * 7 * 9, 3)
    np.testing.assert_array_equal(shown[4::9, 4::9], np.vstack([np.hstack(RANDOM[:3]), np.hstack(RANDOM[3:])]))


def test_an_image_of_another_size_is_averaged_over_areas() -> None:
    halves = np.zeros((4, 4, 3), np.uint8)
    halves[:, 1::2] = 100
    assert torch.equal(read_image(encode_png(halves), resolution=2), from_uint8(np.full((2, 2, 3), 50, np.uint8)))


def test_gray_of_16_bits_is_scaled_as_in_training() -> None:
    """In requests and in uploads, where it may also be a mask."""
    data = encode_png(np.array([[0, 100 * 257], [200 * 257, 65535]], np.uint16))
    wanted = [[0, 100], [200, 255]]
    uploaded = read_given({"image": data, "mask": data}, task=None, side=2, pixels=4)
    for image in (open_given_image(data, to_mask), open_image(uploaded["mask"])):
        assert np.asarray(image).tolist() == wanted
    for image in (open_given_image(data, to_rgb), open_image(uploaded["image"]), decode_image(data)):
        assert np.asarray(image)[..., 0].tolist() == wanted


def test_a_given_image_is_upright_on_white_as_in_training_and_a_transparent_mask_is_white_where_it_is_clear() -> None:
    """In requests and in uploads: black under a logo, or a photograph lying on its side, was never learned."""
    drawing = np.zeros((2, 3, 4), np.uint8)
    drawing[0, :, 3] = 255  # a black line above, clear below
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 3  # upside down
    buffer = io.BytesIO()
    Image.fromarray(drawing).save(buffer, "PNG", exif=exif)
    data = buffer.getvalue()
    uploaded = read_given({"image": data, "mask": data}, task="inpainting", side=4, pixels=6)
    for image in (open_given_image(data, to_rgb), open_image(uploaded["image"]), decode_image(data)):
        assert np.asarray(image)[..., 0].tolist() == [[255] * 3, [0] * 3]
    for mask in (open_given_image(data, to_mask), open_image(uploaded["mask"])):
        assert np.asarray(mask).tolist() == [[255] * 3, [0] * 3]


def test_the_image_of_a_request_is_opened_under_the_limits_of_files_of_strangers() -> None:
    eps = io.BytesIO()
    Image.new("RGB", (8, 8)).save(eps, "EPS")  # Pillow would start Ghostscript
    bombs = (png_of(2**16, 2**16, b""), png_of(2**14, MAX_PIXELS // 2**14 + 1, b""))
    with pytest.raises(ValueError, match="cannot identify"):
        open_given_image(eps.getvalue(), to_rgb)
    for data in (b"", b"no image", encode_png(RANDOM[0])[:60], *bombs):
        with pytest.raises(ValueError, match=r"^the given image can't be read \(.*\); give a PNG$"):
            open_given_image(data, to_rgb)
