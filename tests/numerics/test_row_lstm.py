"""Laws of what a Row LSTM can see."""

import pytest
import torch
from torch import nn

from components.models.row_lstm import lstm
from tests.pixel_models import Place, make_model, places, seen_places

ENTRY_REACH = 3  # to each side of the first layer's kernel of 7, and rows above


def in_reach(place: Place, other: Place, *, left: int) -> bool:
    """Whether `other` comes before `place` and lies in its triangle.

    Each row up, the state reaches one column further to each side. To the right the first layer adds its own reach in
    the last of these rows, so d rows above it is d + 2 columns. To the left it adds that in any row, and each recurrent
    layer kernel_size // 2: `left` columns in all, and d more.
    """
    (row, column, _), (i, j, _) = place, other
    rows = row - i
    if rows == 0:
        return other < place and column - j <= left
    return rows > 0 and column - j <= left + rows and j - column <= rows - 1 + ENTRY_REACH


@pytest.mark.parametrize(("num_channels", "embedding"), [(3, "intensity"), (1, "table")])
def test_every_value_sees_the_triangle_above_it_and_nothing_else(num_channels: int, embedding: str):
    """No leak. Out of reach, as the paper says of the triangular context: what is far to the right in near rows."""
    model = make_model("row_lstm", num_channels=num_channels, embedding=embedding)
    seen = seen_places(model, height=4, width=8)
    order = places(model, height=4, width=8)
    left = ENTRY_REACH + 2 * (3 // 2)  # two recurrent layers with a kernel of 3
    for place in order:
        assert seen[place] == {other for other in order if in_reach(place, other, left=left)}, place


def test_what_is_out_of_reach_is_far_to_the_right_or_left():
    """The earlier positions that position (2, 0) of an 8 columns wide grid can't see, and those that (2, 7) can't."""
    model = make_model("row_lstm", num_channels=1)
    seen = seen_places(model, height=3, width=8)
    order = places(model, height=3, width=8)

    def missing(row: int, column: int) -> list[tuple[int, int]]:
        place = (row, column, 0)
        return [other[:2] for other in order if other < place and other not in seen[place]]

    assert missing(1, 0) == [(0, 4), (0, 5), (0, 6), (0, 7)]
    assert missing(2, 0) == [(0, 5), (0, 6), (0, 7), (1, 4), (1, 5), (1, 6), (1, 7)]
    assert missing(2, 7) == [(1, 0), (2, 0), (2, 1)]


def test_one_step_equals_the_lstm_cell_of_torch():
    """With gates in torch's order: input, forget, content, output."""
    torch.manual_seed(0)
    cell = nn.LSTMCell(3, 5).double()
    x, state, memory = torch.randn(2, 3).double(), torch.randn(2, 5).double(), torch.randn(2, 5).double()
    gates = x @ cell.weight_ih.T + cell.bias_ih + state @ cell.weight_hh.T + cell.bias_hh
    let_in, keep, content, let_out = gates.chunk(4, dim=1)
    ours = lstm(torch.cat([let_out, keep, let_in, content], dim=1), memory)
    torch.testing.assert_close(ours, cell(x, (state, memory)))
