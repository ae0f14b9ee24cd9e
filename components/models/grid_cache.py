"""Drawing an image value by value without computing any position twice.

What a layer takes from the rows above is computed once a row; what it takes from the row itself, for one color of one
position at a time, by matrices that hold the masked weights. All buffers but those of whole rows are allocated once.

Shapes: B batch, C num_channels (colors), H W height and width, K num_values, I O channels in and out of a convolution.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from components.models.masked import NO_COLOR, RowConv2d, RowsConv2d, ValueEmbedding, ValueHead


class CachedRowConv:
    """A `RowConv2d` along a row, for a single color of a single position at a time."""

    def __init__(self, conv: RowConv2d, *, batch_size: int, width: int) -> None:
        num_colors = max(conv.out_groups) + 1
        self.num_inputs, self.start = conv.in_channels, conv.reach * conv.in_channels
        self.window = self.start + self.num_inputs
        self.inputs = conv.weight.new_zeros(batch_size, self.start + width * self.num_inputs)
        free = [channel for channel, color in enumerate(conv.in_groups) if color == NO_COLOR]
        self.inputs.view(batch_size, -1, self.num_inputs)[:, conv.reach :, free] = 1
        self.shares = [_places(conv.in_groups, color) for color in range(num_colors)]  # consecutive
        self.rows = [_places(conv.out_groups, color) for color in range(num_colors)]
        weight = conv.masked_weight()[:, :, 0]  # (O, I, reach + 1)
        self.matrices = [rearrange(weight[rows], "o i t -> (t i) o").contiguous() for rows in self.rows]
        assert conv.bias is not None
        self.biases = [conv.bias[rows] for rows in self.rows]

    def write(self, x: Tensor, *, column: int, color: int) -> None:
        """Set the input channels of a color, (B, I / C), at a position."""
        self._share(column, color).copy_(x)

    def read(self, *, column: int, color: int) -> Tensor:
        return self._share(column, color)

    def apply(self, *, column: int, color: int, bias: Tensor | None = None) -> Tensor:
        """The output channels of a color, (B, O / C); `bias` stands for the convolution's own."""
        first = column * self.num_inputs
        inputs = self.inputs[:, first : first + self.window]
        return torch.addmm(self.biases[color] if bias is None else bias, inputs, self.matrices[color])

    def row(self) -> Tensor:
        """The whole row of inputs, (B, I, W)."""
        return rearrange(self.inputs[:, self.start :], "b (w i) -> b i w", i=self.num_inputs)

    def terms(self, x: Tensor) -> Tensor:
        """Contribution of a row above and the bias to the outputs, for `apply`: (C, W, B, O / C).

        The row `x` is (B, O, W).
        """
        return torch.stack(
            [rearrange(x[:, rows], "b o w -> w b o") + bias for rows, bias in zip(self.rows, self.biases, strict=True)]
        )

    def _share(self, column: int, color: int) -> Tensor:
        places = self.shares[color]
        first = self.start + column * self.num_inputs + places[0]
        return self.inputs[:, first : first + len(places)]


class CachedRowsConv:
    """A `RowsConv2d`, evaluated row by row."""

    def __init__(self, conv: RowsConv2d, *, batch_size: int, width: int) -> None:
        self.conv = conv
        self.inputs = conv.weight.new_zeros(batch_size, conv.in_channels, conv.rows, width + 2 * conv.reach)

    def append(self, row: Tensor) -> Tensor:
        """The output (B, O, W) for the next row of inputs (B, I, W)."""
        padded = F.pad(row, (self.conv.reach, self.conv.reach))[:, :, None]
        self.inputs = torch.cat([self.inputs[:, :, 1:], padded], dim=2)
        return F.conv2d(self.inputs, self.conv.weight, self.conv.bias)[:, :, 0]


class CachedLayer(Protocol):
    """A layer of a network, at the current row of the drawing."""

    conv: CachedRowConv  # takes what the layer before gives

    def begin_row(self, above: Tensor | None) -> Tensor | None:
        """Take the row above from the layer before, None above the first row; return the next layer's."""

    def step(self, *, column: int, color: int) -> Tensor:
        """The layer's output, (B, I / C)."""


class GridCache:
    """An image in the course of drawing: `index` of the C * H * W values are known."""

    def __init__(
        self,
        layers: Sequence[CachedLayer],
        *,
        embedding: ValueEmbedding,
        head: ValueHead,
        batch_size: int,
        height: int,
        width: int,
    ) -> None:
        self.layers, self.embedding = layers, embedding
        self.head = [CachedRowConv(conv, batch_size=batch_size, width=1) for conv in (head.hidden, head.out)]
        self.num_channels, self.height, self.width = head.num_channels, height, width
        self.index = 0

    def append(self, values: Tensor) -> None:
        """Make the next value of each image, (B,), known.

        Raises IndexError when nothing depends on it: it is the last one.
        """
        total = self.num_channels * self.height * self.width
        if self.index + 1 >= total:
            raise IndexError(f"the cache is full: an image has {total} values")
        column, color = self._place()
        self.layers[0].conv.write(self.embedding.lookup(values), column=column, color=color)
        self.index += 1

    def logits(self) -> Tensor:
        """Logits (B, K) of the next value."""
        column, color = self._place()
        if column == 0 and color == 0:
            self._begin_row()
        for layer, following in zip(self.layers, self.layers[1:], strict=False):
            following.conv.write(layer.step(column=column, color=color), column=column, color=color)
        x = self.layers[-1].step(column=column, color=color)
        for conv in self.head:
            conv.write(F.relu(x), column=0, color=color)
            x = conv.apply(column=0, color=color)
        return x

    def _place(self) -> tuple[int, int]:
        position, color = divmod(self.index, self.num_channels)
        return position % self.width, color

    def _begin_row(self) -> None:
        above = self.layers[0].conv.row() if self.index > 0 else None
        for layer in self.layers:
            above = layer.begin_row(above)


def _places(groups: tuple[int, ...], color: int) -> list[int]:
    """The channels of a color."""
    return [channel for channel, group in enumerate(groups) if group == color]
