"""Laws of masks: somewhere inside the image, as large as asked for, never all of it."""

import pytest
import torch
from scipy import ndimage

from components.models.diffusion.degradation import (
    NUMBERS,
    RECTANGLES,
    border_mask,
    brushed,
    inpainting_mask,
    rectangle,
    strokes,
)

AREA = (0.2, 0.5)


def draws(count: int) -> list[list[float]]:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(count, NUMBERS, generator=generator, dtype=torch.float64).tolist()


def share(mask: torch.Tensor) -> float:
    return mask.double().mean().item()


@pytest.mark.parametrize("resolution", [4, 8, 64])
@pytest.mark.parametrize("make", [inpainting_mask, border_mask])
def test_a_mask_has_pixels_and_leaves_pixels(make, resolution: int) -> None:
    for numbers in draws(200):
        mask = make(numbers, resolution, area=AREA)
        assert mask.shape == (resolution, resolution)
        assert mask.dtype == torch.bool
        assert 0 < share(mask) < 1


@pytest.mark.parametrize("extreme", [0.0, 1 - 2**-24])
def test_the_ends_of_the_unit_interval_make_masks_too(extreme: float) -> None:
    for resolution in (4, 16):
        for mask in (
            border_mask([extreme] * NUMBERS, resolution, area=AREA),
            strokes([extreme] * NUMBERS, resolution),
            rectangle([extreme] * NUMBERS, resolution, area=AREA),
        ):
            assert 0 < share(mask) < 1


@pytest.mark.parametrize("make", [rectangle, border_mask])
def test_a_rectangle_and_a_border_hide_the_share_that_was_drawn(make) -> None:
    for numbers in draws(50):
        wanted = AREA[0] + (AREA[1] - AREA[0]) * numbers[0]
        assert share(make(numbers, 512, area=AREA)) == pytest.approx(wanted, abs=0.01)


def test_a_rectangle_is_one_filled_box_anywhere_in_the_image() -> None:
    seen = torch.zeros(16, 16)
    for numbers in draws(2000):
        mask = rectangle(numbers, 16, area=(0.05, 0.2))
        rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
        box = mask[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        assert box.all()
        assert 0.35 <= len(rows) / len(columns) <= 2.9  # from half to twice, rounded to pixels
        seen += mask
    assert (seen > 0).all()


def test_a_border_has_one_width_and_each_number_of_sides_comes_alike() -> None:
    counts = [0] * 5
    for numbers in draws(800):
        mask = border_mask(numbers, 64, area=AREA)
        known = ~mask
        rows, columns = known.any(1).nonzero().flatten(), known.any(0).nonzero().flatten()
        assert known[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1].all()
        widths = {int(w) for w in (rows.min(), 63 - rows.max(), columns.min(), 63 - columns.max())} - {0}
        assert len(widths) == 1
        counts[sum(int(w) > 0 for w in (rows.min(), 63 - rows.max(), columns.min(), 63 - columns.max()))] += 1
    assert counts[0] == 0
    assert min(counts[1:]) > 150


def test_a_brushed_line_is_all_that_lies_within_its_radius() -> None:
    mask = brushed(torch.tensor([[2.0, 8.5], [14.0, 8.5]], dtype=torch.float64), 2.0, 16)
    assert mask[8, 2:14].all()
    assert torch.equal(mask.any(1).nonzero().flatten(), torch.arange(6, 11))
    assert torch.equal(mask, mask.flip(1))


def test_strokes_are_at_most_three_pieces_and_scale_with_the_image() -> None:
    shares = {64: [], 128: []}
    for numbers in draws(60):
        for resolution, found in shares.items():
            mask = strokes(numbers, resolution)
            assert ndimage.label(mask.numpy(), structure=[[1] * 3] * 3)[1] <= 3
            found.append(share(mask))
    assert shares[64] == pytest.approx(shares[128], abs=0.02)
    assert 0.05 < sum(shares[64]) / 60 < 0.5


def test_half_of_the_inpainting_masks_are_rectangles() -> None:
    for numbers in draws(30):
        made = rectangle(numbers[1:], 32, area=AREA) if numbers[0] < RECTANGLES else strokes(numbers[1:], 32)
        assert torch.equal(inpainting_mask(numbers, 32, area=AREA), made)
