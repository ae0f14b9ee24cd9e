"""Gated PixelCNN (van den Oord et al. 2016, "Conditional Image Generation with PixelCNN Decoders").
Shapes: B batch, C num_channels (colors), H W height and width, I channels into a layer, D channels."""

from typing import Any

from torch import Tensor, nn

from components.models.layers import NetworkBlock
from components.models.masked import (
    FIRST_KERNEL_SIZE,
    CachedLayer,
    CachedRowConv,
    CachedRowsConv,
    Groups,
    LabelBias,
    PixelNetwork,
    RowConv2d,
    RowsConv2d,
    ValueHead,
    shift_down,
)


class GatedLayer(NetworkBlock):
    """A gated layer of two stacks (figure 2): the vertical sees rows above, the horizontal the row.
    Together the stacks see everything that comes before: there is no blind spot. Mask A (`first`) has no residual,
    because a residual would show a position to itself."""

    def __init__(
        self, in_groups: Groups, *, groups: Groups, kernel_size: int, num_labels: int, dropout: float, first: bool
    ) -> None:
        super().__init__()
        channels, reach = len(groups), kernel_size // 2
        self.first = first
        self.vertical = RowsConv2d(len(in_groups), 2 * channels, rows=reach + 1, kernel_size=kernel_size)
        self.vertical_label = LabelBias(num_labels, 2 * channels)
        self.link = nn.Conv2d(2 * channels, 2 * channels, 1)  # no mask: the colors of rows above may all be seen
        self.horizontal = RowConv2d(in_groups, groups + groups, reach=reach, mask="A" if first else "B")
        self.horizontal_label = LabelBias(num_labels, 2 * channels)
        self.mix = RowConv2d(groups, groups)
        self.dropout = nn.Dropout(dropout)

    def forward(self, vertical: Tensor, horizontal: Tensor, *, label: Tensor) -> tuple[Tensor, Tensor]:
        """(B, I, H, W) of each stack -> (B, D, H, W) of each."""
        rows = self.vertical(vertical) + self.vertical_label(label)  # (B, 2D, H, W), sees row r and those above
        # Taken before the gate, and one row down: row r must not see what is right of it.
        row = self.horizontal(horizontal) + self.link(shift_down(rows)) + self.horizontal_label(label)
        out = self.mix(self.dropout(gate(row)))
        return self.dropout(gate(rows)), out if self.first else horizontal + out


def gate(x: Tensor) -> Tensor:
    """Equation 4, (B, 2D, …) -> (B, D, …): tanh of the first half times sigmoid of the second."""
    signal, opening = x.chunk(2, dim=1)
    return signal.tanh() * opening.sigmoid()


class GatedPixelCNN(PixelNetwork):
    """A first gated layer with a kernel of 7, and `num_layers` more.

    Args: see `PixelNetwork`; channels is D, and `dropout` the probability, in [0, 1), after each gate.
    """

    def __init__(self, *, num_layers: int, dropout: float = 0.0, **settings: Any) -> None:
        super().__init__(**settings)
        self.layers = nn.ModuleList(
            GatedLayer(
                groups=self.groups,
                num_labels=self.null_label + 1,
                dropout=dropout,
                first=i == 0,
                in_groups=self.groups if i > 0 else self.embedding.groups,
                kernel_size=settings["kernel_size"] if i > 0 else FIRST_KERNEL_SIZE,
            )
            for i in range(num_layers + 1)
        )
        self.head = ValueHead(len(self.groups), num_channels=self.num_channels, num_values=self.num_values)

    def features(self, x: Tensor, *, label: Tensor) -> Tensor:
        vertical = horizontal = x
        for layer in self.layers:
            vertical, horizontal = layer(vertical, horizontal, label=label)
        return horizontal

    def cached_layers(self, *, label: Tensor, width: int) -> list[CachedLayer]:
        layers = (layer for layer in self.layers if isinstance(layer, GatedLayer))
        return [CachedGatedLayer(layer, label=label, width=width) for layer in layers]


class CachedGatedLayer:
    """A `GatedLayer` at the current row of the drawing."""

    def __init__(self, layer: GatedLayer, *, label: Tensor, width: int) -> None:
        self.layer = layer
        self.conv = CachedRowConv(layer.horizontal, batch_size=len(label), width=width)
        self.mix = CachedRowConv(layer.mix, batch_size=len(label), width=1)
        self.vertical = CachedRowsConv(layer.vertical, batch_size=len(label), width=width)
        self.vertical_label = layer.vertical_label(label)[..., 0]  # (B, 2D, 1)
        self.horizontal_label = layer.horizontal_label(label)[..., 0]
        self.nothing = self.terms = layer.link.weight.new_zeros(len(label), layer.link.in_channels, width)

    def begin_row(self, above: Tensor | None) -> Tensor | None:
        """The vertical stack's row above, (B, I, W) -> (B, D, W)."""
        rows = self.nothing if above is None else self.vertical.append(above) + self.vertical_label
        link = self.layer.link(rows[:, :, None])[:, :, 0]
        self.terms = self.conv.terms(link + self.horizontal_label)  # (C, W, B, 2D / C)
        return None if above is None else gate(rows)

    def step(self, *, column: int, color: int) -> Tensor:
        """The horizontal stack's features of a color, (B, D / C)."""
        row = self.conv.apply(column=column, color=color, bias=self.terms[color, column])
        self.mix.write(gate(row), column=0, color=color)
        out = self.mix.apply(column=0, color=color)
        return out if self.layer.first else out + self.conv.read(column=column, color=color)
