"""Laws of what a gated PixelCNN can see."""

import pytest
import torch

from components.models.masked import color_groups
from tests.pixel_models import make_model, places, random_values, seen_places


@pytest.mark.parametrize(
    ("num_channels", "embedding"), [(3, "intensity"), (1, "table"), (1, "intensity"), (2, "table")]
)
def test_every_value_sees_all_that_come_before_it_and_nothing_else(num_channels: int, embedding: str):
    """No leak and no blind spot, for every color of every position."""
    model = make_model("pixelcnn", num_channels=num_channels, embedding=embedding)
    seen = seen_places(model, height=5, width=6)
    order = places(model, height=5, width=6)
    for index, place in enumerate(order):
        assert seen[place] == set(order[:index]), place


def test_a_single_layer_sees_its_kernel_only():
    """The first layer alone: four rows above by 7 columns, and three positions to the left. Nothing reaches further,
    so what the law above finds complete is not a constant leak."""
    model = make_model("pixelcnn", num_channels=1, num_layers=0)
    seen = seen_places(model, height=7, width=9)
    for row, column, _ in places(model, height=7, width=9):
        expected = {(i, j, 0) for i in range(max(0, row - 4), row) for j in range(9) if abs(j - column) <= 3}
        expected |= {(row, j, 0) for j in range(max(0, column - 3), column)}
        assert seen[row, column, 0] == expected


@torch.no_grad()
def test_the_network_takes_grids_of_any_size():
    model = make_model("pixelcnn")
    values = random_values(model, batch_size=1, height=9, width=7)
    torch.testing.assert_close(model(values)[:, :, :4], model(values[:, :, :4]))


@torch.no_grad()
def test_mid_gray_is_not_the_outside_of_the_image():
    """Intensity 0 is mid-gray and also what pads the convolutions; the channel of ones tells them apart."""
    model = make_model("pixelcnn", num_values=3, num_channels=1, num_layers=0)
    narrow, wide = (model(torch.ones(1, 1, 3, width, dtype=torch.int64)) for width in (4, 5))
    assert not torch.allclose(narrow[..., -1, :], wide[..., -2, :])  # here one ends and the other goes on


def test_colors_share_channels_in_every_part_of_a_gate():
    assert color_groups(6, num_channels=3, parts=2) == (0, 0, 1, 1, 2, 2) * 2
