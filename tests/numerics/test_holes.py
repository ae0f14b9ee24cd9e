"""Laws of holes: somewhere inside the picture, as large as asked for, never all of it."""

import pytest
import torch
from scipy import ndimage

from components.diffusion.holes import (
    NUMBERS,
    RECTANGLES,
    border_hole,
    brushed,
    inpainting_hole,
    rectangle,
    strokes,
)

AREA = (0.2, 0.5)


def draws(count: int) -> list[list[float]]:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(count, NUMBERS, generator=generator, dtype=torch.float64).tolist()


def share(hole: torch.Tensor) -> float:
    return hole.double().mean().item()


@pytest.mark.parametrize("resolution", [4, 8, 64])
@pytest.mark.parametrize("make", [inpainting_hole, border_hole])
def test_a_hole_has_pixels_and_leaves_pixels(make, resolution: int) -> None:
    for numbers in draws(200):
        hole = make(numbers, resolution, area=AREA)
        assert hole.shape == (resolution, resolution)
        assert hole.dtype == torch.bool
        assert 0 < share(hole) < 1


@pytest.mark.parametrize("extreme", [0.0, 1 - 2**-24])
def test_the_ends_of_the_unit_interval_make_holes_too(extreme: float) -> None:
    for resolution in (4, 16):
        for hole in (
            border_hole([extreme] * NUMBERS, resolution, area=AREA),
            strokes([extreme] * NUMBERS, resolution),
            rectangle([extreme] * NUMBERS, resolution, area=AREA),
        ):
            assert 0 < share(hole) < 1


@pytest.mark.parametrize("make", [rectangle, border_hole])
def test_a_rectangle_and_a_border_hide_the_share_that_was_drawn(make) -> None:
    for numbers in draws(50):
        wanted = AREA[0] + (AREA[1] - AREA[0]) * numbers[0]
        assert share(make(numbers, 512, area=AREA)) == pytest.approx(wanted, abs=0.01)


def test_a_rectangle_is_one_filled_box_anywhere_in_the_picture() -> None:
    seen = torch.zeros(16, 16)
    for numbers in draws(2000):
        hole = rectangle(numbers, 16, area=(0.05, 0.2))
        rows, columns = hole.any(1).nonzero().flatten(), hole.any(0).nonzero().flatten()
        box = hole[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        assert box.all()
        assert 0.35 <= len(rows) / len(columns) <= 2.9  # from half to twice, rounded to pixels
        seen += hole
    assert (seen > 0).all()


def test_a_border_has_one_width_and_each_number_of_sides_comes_alike() -> None:
    counts = [0] * 5
    for numbers in draws(800):
        hole = border_hole(numbers, 64, area=AREA)
        known = ~hole
        rows, columns = known.any(1).nonzero().flatten(), known.any(0).nonzero().flatten()
        assert known[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1].all()
        widths = {int(w) for w in (rows.min(), 63 - rows.max(), columns.min(), 63 - columns.max())} - {0}
        assert len(widths) == 1
        counts[sum(int(w) > 0 for w in (rows.min(), 63 - rows.max(), columns.min(), 63 - columns.max()))] += 1
    assert counts[0] == 0
    assert min(counts[1:]) > 150


def test_a_brushed_line_is_all_that_lies_within_its_radius() -> None:
    hole = brushed(torch.tensor([[2.0, 8.5], [14.0, 8.5]], dtype=torch.float64), 2.0, 16)
    assert hole[8, 2:14].all()
    assert torch.equal(hole.any(1).nonzero().flatten(), torch.arange(6, 11))
    assert torch.equal(hole, hole.flip(1))


def test_strokes_are_at_most_three_pieces_and_scale_with_the_picture() -> None:
    shares = {64: [], 128: []}
    for numbers in draws(60):
        for resolution, found in shares.items():
            hole = strokes(numbers, resolution)
            assert ndimage.label(hole.numpy(), structure=[[1] * 3] * 3)[1] <= 3
            found.append(share(hole))
    assert shares[64] == pytest.approx(shares[128], abs=0.02)
    assert 0.05 < sum(shares[64]) / 60 < 0.5


def test_half_of_the_inpainting_holes_are_rectangles() -> None:
    for numbers in draws(30):
        made = rectangle(numbers[1:], 32, area=AREA) if numbers[0] < RECTANGLES else strokes(numbers[1:], 32)
        assert torch.equal(inpainting_hole(numbers, 32, area=AREA), made)
