"""Networks of pixels: the gated PixelCNN, and the Row LSTM.

Sources: van den Oord et al. 2016, "Conditional Image Generation with PixelCNN Decoders"; van den Oord et al. 2016,
"Pixel Recurrent Neural Networks", section 3.1. The Row LSTM reads an image row by row: the state of a position is made
of the three states above it and of the row so far. What it can see is therefore a triangle that opens upwards; far to
the right in near rows stays out of reach.

Shapes: B batch, C num_channels (colors), H W height and width, I channels into a layer, D channels, S = D / 2 of the
Row LSTM's state."""

from typing import Any

import torch
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
    color_groups,
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
    Arguments are those of `PixelNetwork`; channels is D, and `dropout` the probability, in [0, 1), after each gate."""

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


class EntryLayer(nn.Module):
    """A convolution with mask A, (B, I, H, W) -> (B, D, H, W), over three rows above and the row so far."""

    def __init__(self, in_groups: Groups, *, groups: Groups) -> None:
        super().__init__()
        reach = FIRST_KERNEL_SIZE // 2
        self.above = RowsConv2d(len(in_groups), len(groups), rows=reach, kernel_size=FIRST_KERNEL_SIZE)
        self.beside = RowConv2d(in_groups, groups, reach=reach, mask="A")

    def forward(self, x: Tensor) -> Tensor:
        return self.beside(x) + shift_down(self.above(x))


class RowLSTMLayer(NetworkBlock):
    """A recurrent layer with a residual (equation 3, figure 5), (B, D, H, W) -> (B, D, H, W)."""

    def __init__(self, *, channels: int, num_channels: int, kernel_size: int, num_labels: int, dropout: float) -> None:
        super().__init__()
        state = channels // 2
        groups = color_groups(channels, num_channels=num_channels)
        state_groups = color_groups(state, num_channels=num_channels)
        self.input_to_state = RowConv2d(groups, 4 * state_groups, reach=kernel_size // 2)
        self.label = LabelBias(num_labels, 4 * state)
        self.state_to_state = nn.Conv1d(state, 4 * state, 3, padding=1, bias=False)
        self.mix = RowConv2d(state_groups, groups)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, *, label: Tensor) -> Tensor:
        gates = self.input_to_state(x) + self.label(label)  # (B, 4S, H, W)
        state = cell = self.state_to_state.weight.new_zeros(x.shape[0], self.state_to_state.in_channels, x.shape[3])
        states = []
        for row in gates.unbind(dim=2):
            state, cell = lstm(row + self.state_to_state(state), cell)
            states.append(state)
        return x + self.mix(self.dropout(torch.stack(states, dim=2)))


def lstm(gates: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
    """Equation 3: gates (B, 4S, …) and cell (B, S, …) -> the new state and cell.
    The gates are in the order output, forget, input, content."""
    opened, content = gates.tensor_split([3 * cell.shape[1]], dim=1)
    let_out, keep, let_in = opened.sigmoid().chunk(3, dim=1)
    cell = keep * cell + let_in * content.tanh()
    return let_out * cell.tanh(), cell


class RowLSTM(PixelNetwork):
    """A first convolution with a kernel of 7, and `num_layers` recurrent layers.

    Arguments are those of `PixelNetwork`; channels is D, a multiple of 2 * num_channels, for the state has half as
    many; kernel_size is that of input-to-state, and `dropout` the probability, in [0, 1), on each residual branch.
    Raises ValueError as `PixelNetwork`, or when the colors can't share the state's channels equally."""

    def __init__(
        self, *, num_channels: int, channels: int, num_layers: int, dropout: float = 0.0, **settings: Any
    ) -> None:
        if channels % (2 * num_channels):
            raise ValueError(
                f"channels {channels} must be a multiple of {2 * num_channels}: the state has half of them"
            )
        super().__init__(num_channels=num_channels, channels=channels, **settings)
        self.entry = EntryLayer(self.embedding.groups, groups=self.groups)
        self.layers = nn.ModuleList(
            RowLSTMLayer(
                channels=channels,
                num_channels=num_channels,
                kernel_size=settings["kernel_size"],
                num_labels=self.null_label + 1,
                dropout=dropout,
            )
            for _ in range(num_layers)
        )
        self.head = ValueHead(channels, num_channels=num_channels, num_values=self.num_values)

    def features(self, x: Tensor, *, label: Tensor) -> Tensor:
        x = self.entry(x)
        for layer in self.layers:
            x = layer(x, label=label)
        return x

    def cached_layers(self, *, label: Tensor, width: int) -> list[CachedLayer]:
        layers = (layer for layer in self.layers if isinstance(layer, RowLSTMLayer))
        recurrent = [CachedRowLSTMLayer(layer, label=label, width=width) for layer in layers]
        return [CachedEntryLayer(self.entry, batch_size=len(label), width=width), *recurrent]


class CachedEntryLayer:
    """An `EntryLayer` at the current row of the drawing."""

    def __init__(self, layer: EntryLayer, *, batch_size: int, width: int) -> None:
        self.conv = CachedRowConv(layer.beside, batch_size=batch_size, width=width)
        self.above = CachedRowsConv(layer.above, batch_size=batch_size, width=width)
        self.nothing = self.terms = layer.above.weight.new_zeros(batch_size, layer.above.out_channels, width)

    def begin_row(self, above: Tensor | None) -> Tensor | None:
        """The embedded row above, (B, I, W); recurrent layers keep the needed part."""
        self.terms = self.conv.terms(self.nothing if above is None else self.above.append(above))

    def step(self, *, column: int, color: int) -> Tensor:
        """Features of a color, (B, D / C)."""
        return self.conv.apply(column=column, color=color, bias=self.terms[color, column])


class CachedRowLSTMLayer:
    """A `RowLSTMLayer` at the current row of the drawing.
    `mix` holds the states of the row, and before a state is drawn, the state of the row above."""

    def __init__(self, layer: RowLSTMLayer, *, label: Tensor, width: int) -> None:
        self.layer = layer
        self.conv = CachedRowConv(layer.input_to_state, batch_size=len(label), width=width)
        self.mix = CachedRowConv(layer.mix, batch_size=len(label), width=width)
        self.label = layer.label(label)[..., 0]  # (B, 4S, 1)
        colors, share = len(self.mix.shares), len(self.mix.shares[0])
        self.cells = self.terms = layer.mix.weight.new_zeros(colors, width, len(label), share)

    def begin_row(self, above: Tensor | None) -> Tensor | None:
        states = self.layer.state_to_state(self.mix.row())  # (B, 4S, W); zeros above the first row
        self.terms = self.conv.terms(states + self.label)  # (C, W, B, 4S / C)

    def step(self, *, column: int, color: int) -> Tensor:
        """Features of a color, (B, D / C)."""
        gates = self.conv.apply(column=column, color=color, bias=self.terms[color, column])
        state, cell = lstm(gates, self.cells[color, column])
        self.cells[color, column] = cell
        self.mix.write(state, column=column, color=color)
        return self.mix.apply(column=column, color=color) + self.conv.read(column=column, color=color)
