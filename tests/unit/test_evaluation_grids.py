"""Laws of the labelled grids."""

import io

import numpy as np
import pytest
from PIL import Image

from components.evaluation.gallery import draw_columns
from components.evaluation.grids import (
    CELL,
    INK,
    PAPER,
    GridBlock,
    fit_text,
    in_square,
    labelled_grid,
    render_blocks,
    text_font,
)


def colored(count: int, *, side: int = 16) -> list[np.ndarray]:
    return [np.full((side, side, 3), (10 + 20 * number, 0, 200), np.uint8) for number in range(count)]


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def area_of(png: bytes, color: np.ndarray) -> int:
    return int((pixels(png) == color).all(axis=-1).sum())


@pytest.mark.parametrize("side", [8, 16, 64, 100, 256])
def test_every_image_is_shown_whole_and_enlarged_by_a_whole_factor(side: int) -> None:
    images = colored(7, side=side)
    grid = labelled_grid(images, [f"image {number}" for number in range(7)])
    cell = side * -(-CELL // side)
    assert [area_of(grid, image[0, 0]) for image in images] == [cell**2] * 7


def test_neighbors_with_one_label_stand_in_one_row_with_the_words_right_below_its_images() -> None:
    images = colored(6)
    grid = pixels(labelled_grid(images, ["cats"] * 3 + ["flags"] * 3))
    rows = [np.flatnonzero((grid == image[0, 0]).all(axis=-1).any(axis=1)) for image in images]
    ink = np.flatnonzero((grid == INK).all(axis=-1).any(axis=1))
    assert len({tuple(row) for row in rows[:3]}) == len({tuple(row) for row in rows[3:]}) == 1
    assert set(ink) & set(range(rows[0].max() + 1, rows[3].min()))
    assert ink.min() > rows[0].max()
    assert set(ink) & set(range(rows[3].max() + 1, len(grid)))


def test_labels_are_drawn_and_never_outside_of_the_grid() -> None:
    long = labelled_grid(colored(2), ["a caption that is much longer than its image is wide"] * 2)
    assert (pixels(long).max(axis=-1) < 60).any()
    assert (pixels(long)[:, -1] == PAPER).all()


def test_text_stays_readable_where_a_page_shows_large_images_small() -> None:
    """Shown at 128 pixels an image, as those of the demo are, captions of 1024² are at least half as high as theirs."""
    blank = (np.full((side, side, 3), 255, np.uint8) for side in (64, 1024))
    grids = [pixels(labelled_grid([image], ["caption"])) for image in blank]
    small, large = (int((grid < 128).all(axis=-1).any(axis=1).sum()) for grid in grids)  # rows with dark ink
    assert large * 128 / 1024 >= small / 2


def test_text_is_cut_to_its_width_with_an_ellipsis_and_letters_of_many_alphabets_have_a_shape() -> None:
    assert fit_text("a red thing,\nnumber 0\r\n", 10_000, text_font()) == "a red thing, number 0"
    cut = fit_text("a much longer text than fits", 100, text_font())
    assert cut.endswith("…")
    assert len(cut) < 20
    shapes = [bytes(text_font().getmask(letter)) for letter in "éñøßЖλ\uffff"]
    assert len(set(shapes)) == len(shapes)


def test_a_heading_is_shown_whole_above_few_images() -> None:
    heading = "reconstructions of held-out images by their codes"
    grid = render_blocks([GridBlock(heading, [np.full((CELL, CELL, 3), 255, np.uint8)])], columns=1)
    shown = np.argwhere((pixels(grid) < 100).all(axis=-1))
    assert np.ptp(shown[:, 1]) == pytest.approx(text_font().getlength(heading), abs=6)


def test_a_reconstruction_stands_right_below_its_original_and_a_strip_holds_both_rows_of_every_frame() -> None:
    originals, others = colored(4), [255 - image for image in colored(4)]
    grid = pixels(draw_columns({"original": np.stack(originals), "reconstruction": np.stack(others)}))
    for original, other in zip(originals, others, strict=True):
        above, below = (np.argwhere((grid == image[0, 0]).all(axis=-1)) for image in (original, other))
        assert above[:, 0].max() < below[:, 0].min()
        np.testing.assert_array_equal(np.unique(above[:, 1]), np.unique(below[:, 1]))
    clean = GridBlock("x_0", others, [f"t = {t}" for t in (999, 666, 333, 0)])
    strip = render_blocks([GridBlock("x_t", originals), clean], columns=4)
    assert all(area_of(strip, image[0, 0]) == CELL**2 for image in originals + others)


@pytest.mark.parametrize(("count", "labels"), [(2, ["one"]), (0, [])])
def test_a_grid_without_a_label_for_each_image_is_refused(count: int, labels: list[str]) -> None:
    with pytest.raises(ValueError, match="one label for each image"):
        labelled_grid(colored(count), labels)


def test_a_wide_image_keeps_its_shape() -> None:
    wide = np.zeros((2, 4, 3), np.uint8)
    shown = np.asarray(in_square(wide, 8))
    assert shown.shape == (8, 8, 3)
    assert (shown[2:6] == 0).all()
    assert (shown[[0, 1, 6, 7]] == 255).all()
