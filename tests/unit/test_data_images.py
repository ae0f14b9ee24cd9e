"""Laws of image decoding: whatever the file's mode, an upright RGB square without aliasing comes out."""

import io
from functools import partial

import numpy as np
import pytest
from PIL import Image
from simplejpeg import decode_jpeg

from components.data.images import fit_square, load_depth, load_image, load_mask
from components.sampling.image_files import decode_image, encode_png


def file_of(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparent_parts_become_white_and_half_transparent_ones_are_mixed_with_white(mode: str) -> None:
    rgba = Image.new("RGBA", (3, 1), (0, 0, 0, 255))
    rgba.putpixel((1, 0), (0, 0, 0, 0))
    rgba.putpixel((2, 0), (0, 0, 0, 128))
    pixels = np.asarray(decode_image(file_of(rgba.convert(mode))))
    np.testing.assert_array_equal(pixels[0, :, 0], [0, 255, 127])


def palette(*colors: tuple[int, int, int]) -> Image.Image:
    image = Image.new("P", (len(colors), 1))
    image.putpalette([value for color in colors for value in color])
    image.putdata(range(len(colors)))
    return image


def test_a_transparent_color_of_a_palette_or_of_rgb_is_flattened_on_white_and_others_stay() -> None:
    assert np.asarray(decode_image(file_of(palette((12, 34, 56)))))[0, 0].tolist() == [12, 34, 56]
    pixels = np.asarray(decode_image(file_of(palette((255, 0, 0), (0, 0, 255)), transparency=1)))
    np.testing.assert_array_equal(pixels[0], [[255, 0, 0], [255, 255, 255]])
    image = Image.new("RGB", (2, 1), (10, 20, 30))
    image.putpixel((1, 0), (1, 2, 3))
    pixels = np.asarray(decode_image(file_of(image, transparency=(1, 2, 3))))
    np.testing.assert_array_equal(pixels[0], [[10, 20, 30], [255, 255, 255]])


MODES = {
    "1": (Image.new("1", (2, 2), 1), 255),
    "L": (Image.new("L", (2, 2), 255), 255),
    "sixteen bits": (Image.fromarray(np.array([[0, 257 * 100, 65535]], np.uint16)), [[0], [100], [255]]),
    "CMYK": (Image.new("RGB", (16, 16), (200, 30, 40)).convert("CMYK"), [200, 30, 40]),
}


@pytest.mark.parametrize("mode", MODES)
def test_an_image_of_any_mode_comes_out_in_its_colors(mode: str) -> None:
    image, expected = MODES[mode]
    data = file_of(image, "JPEG", quality=100) if mode == "CMYK" else file_of(image)
    pixels = np.asarray(decode_image(data)).astype(int)
    assert pixels.shape == (image.height, image.width, 3)
    assert np.abs(pixels - expected).max() <= (4 if mode == "CMYK" else 0)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_image_stands_upright_whatever_its_exif_rotation(orientation: int) -> None:
    upright = Image.new("RGB", (24, 16), (255, 255, 255))
    upright.paste((255, 0, 0), (0, 0, 12, 8))
    upright.paste((0, 0, 255), (12, 8, 24, 16))
    turns = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(turns[orientation]) if orientation in turns else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    np.testing.assert_array_equal(np.asarray(decode_image(file_of(stored, exif=exif))), np.asarray(upright))


def test_a_floating_point_image_is_refused_since_its_range_is_unknown() -> None:
    with pytest.raises(ValueError, match="range"):
        decode_image(file_of(Image.fromarray(np.ones((2, 2), np.float32)), "TIFF"))


@pytest.mark.parametrize("resolution", [48, 32, 20, 16, 10, 8])
def test_a_fine_checkerboard_shrinks_to_even_grey(resolution: int) -> None:
    board = (np.indices((96, 96)).sum(0) % 2 * 255).astype(np.uint8)
    shrunk = np.asarray(fit_square(Image.fromarray(board).convert("RGB"), resolution)).astype(int)
    assert np.abs(shrunk - 127.5).max() <= 8  # a resize without antialiasing gives 0 or 255


def test_the_center_is_cropped_before_the_image_is_resized_and_one_of_the_right_size_is_not_touched() -> None:
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20] = 200
    np.testing.assert_array_equal(load_image(encode_png(wide), resolution=5), np.full((5, 5, 3), 200))
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    np.testing.assert_array_equal(load_image(encode_png(pixels), resolution=16), pixels)


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("how", [{}, {"progressive": True}, {"quality": 30, "optimize": True}, {"keep_rgb": True}])
def test_a_jpeg_that_is_decoded_into_its_place_has_the_pixels_that_pillow_gives(
    subsampling: str, how: dict[str, object]
) -> None:
    """One that is not RGB, or of another size, too."""
    data = file_of(photo(), "JPEG", **({"subsampling": subsampling} | how if "keep_rgb" not in how else how))
    files = [data, *(file_of(photo().convert(mode), "JPEG") for mode in ("L", "CMYK"))]
    for data in (*files, file_of(photo().resize((96, 60)), "JPEG")):
        np.testing.assert_array_equal(load_image(data, resolution=48), fit_square(decode_image(data), 48))


@pytest.mark.parametrize("orientation", [3, 6])
def test_a_square_jpeg_that_lies_on_its_side_is_turned(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = file_of(photo(), "JPEG", exif=exif)
    lying = np.asarray(Image.open(io.BytesIO(data)))
    np.testing.assert_array_equal(load_image(data, resolution=48), np.rot90(lying, {3: 2, 6: 3}[orientation]))


def test_a_jpeg_with_bytes_too_many_is_mended_as_pillow_mends_it_and_a_truncated_one_is_refused_at_any_size() -> None:
    data = file_of(photo(), "JPEG", restart_marker_blocks=4)
    damaged = data.replace(b"\xff\xd1", b"\x00\x00\xff\xd1", 1)  # libjpeg warns of them and goes on
    with pytest.raises(ValueError, match="extraneous"):
        decode_jpeg(damaged)
    np.testing.assert_array_equal(load_image(damaged, resolution=48), np.asarray(decode_image(damaged)))
    data = file_of(photo(), "JPEG")
    for resolution in (48, 32):
        with pytest.raises(OSError, match="truncated"):
            load_image(data[: len(data) // 2], resolution=resolution)


def photo() -> Image.Image:
    """48² of colors that run into each other, and noise: every coefficient of a JPEG is in use."""
    noise = np.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    fine = np.random.default_rng(1).integers(-20, 20, (48, 48, 3))
    smooth = np.asarray(Image.fromarray(noise).resize((48, 48), Image.Resampling.BICUBIC)).astype(int)
    return Image.fromarray((smooth + fine).clip(0, 255).astype(np.uint8))


def test_a_depth_map_becomes_relative_inverse_depth_of_its_central_square() -> None:
    """1/d is linear in the grey value: 255 at the nearest, 0 at the farthest or where nothing was measured."""
    depth = np.array([[1000, 2000], [4000, 1600]])
    expected = [[255, 85], [0, 128]]  # 1/d = 1, 1/2, 1/4, 5/8
    for unit in (1, 10):
        pixels = load_depth(encode_png((depth * unit).astype(np.uint16)), resolution=2)
        assert pixels.dtype == np.uint8
        np.testing.assert_array_equal(pixels[..., 0], expected)
        assert (pixels == pixels[..., :1]).all()
    gaps = load_depth(encode_png(np.array([[0, 500], [1000, 2000]], np.uint16)), resolution=2)
    np.testing.assert_array_equal(gaps[..., 0], [[0, 255], [85, 0]])
    for flat in (0, 700):
        assert not load_depth(encode_png(np.full((4, 4), flat, np.uint16)), resolution=4).any()
    depth = np.full((2, 6), 1, np.uint16)
    depth[:, 2:4] = [[1000, 2000], [2000, 4000]]
    np.testing.assert_array_equal(load_depth(encode_png(depth), resolution=2)[..., 0], [[255, 85], [85, 0]])


def test_a_depth_map_is_resized_after_its_conversion_without_aliasing() -> None:
    depth = np.where(np.indices((96, 96)).sum(0) % 2, 1000, 3000).astype(np.uint16)
    for resolution in (48, 32, 10):
        shrunk = load_depth(encode_png(depth), resolution=resolution).astype(int)
        assert np.abs(shrunk - 127.5).max() <= 8
    enlarged = load_depth(encode_png(np.array([[1000, 3000]] * 2, np.uint16)), resolution=64)
    assert (np.diff(enlarged[0, :, 0].astype(int)) <= 0).all()  # no ringing


@pytest.mark.parametrize("mode", ["L", "P"])
def test_the_values_of_a_mask_are_spread_evenly_and_never_mixed(mode: str) -> None:
    values = np.random.default_rng(0).integers(0, 4, (30, 30), dtype=np.uint8)
    image = Image.fromarray(values)
    if mode == "P":
        image.putpalette([9, 9, 9, 1, 200, 3, 0, 0, 0, 9, 9, 9])  # only the index counts
    data = file_of(image)
    np.testing.assert_array_equal(load_mask(data, resolution=30, mask_values=4)[..., 1], 85 * values)
    for resolution in (7, 64):
        pixels = load_mask(data, resolution=resolution, mask_values=4)
        assert pixels.shape == (resolution, resolution, 3)
        assert set(np.unique(pixels)) == {0, 85, 170, 255}


def test_one_value_is_one_grey_in_all_masks_of_a_set_and_others_are_refused_with_the_remedy() -> None:
    def greys(value: int) -> list[int]:
        mask = encode_png(np.full((2, 2), value, np.uint8))
        return np.unique(load_mask(mask, resolution=2, mask_values=3)).tolist()

    assert (greys(1), greys(2)) == ([128], [255])
    with pytest.raises(ValueError, match=r"value 3, the set's masks 0 to 2; set mask_values in index\.json"):
        greys(3)
    colored = encode_png(np.zeros((2, 2, 3), np.uint8))
    for load in (load_depth, partial(load_mask, mask_values=3)):
        with pytest.raises(ValueError, match="one number a pixel"):
            load(colored, resolution=2)
