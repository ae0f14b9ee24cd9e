"""Row LSTM (van den Oord et al. 2016, "Pixel Recurrent Neural Networks", section 3.1).

It reads an image row by row: the state of a position is made of the three states above it and of the row so far. What
it can see is therefore a triangle that opens upwards; far to the right in near rows stays out of reach.

Shapes: B batch, C num_channels (colors), H W height and width, K num_values, I channels in, D channels, S = D / 2 of
the state.
"""

import torch
from torch import Tensor, nn

from components.models.layers import NetworkBlock
from components.models.masked import (
    FIRST_KERNEL_SIZE,
    CachedLayer,
    CachedRowConv,
    CachedRowsConv,
    Embedding,
    GridCache,
    Groups,
    LabelBias,
    RowConv2d,
    RowsConv2d,
    ValueEmbedding,
    ValueHead,
    check_kernel_size,
    color_groups,
    label_or_null,
    shift_down,
)


class EntryLayer(nn.Module):
    """The first layer, a convolution with mask A, (B, I, H, W) -> (B, D, H, W).

    The layer sees three rows above and the row so far.
    """

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
        state = cell = self.state_to_state.weight.new_zeros(len(x), self.state_to_state.in_channels, x.shape[3])
        states = []
        for row in gates.unbind(dim=2):
            state, cell = lstm(row + self.state_to_state(state), cell)
            states.append(state)
        return x + self.mix(self.dropout(torch.stack(states, dim=2)))


def lstm(gates: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
    """Equation 3: gates (B, 4S, …) and cell (B, S, …) -> the new state and cell.

    The gates are in the order output, forget, input, content.
    """
    opened, content = gates.tensor_split([3 * cell.shape[1]], dim=1)
    let_out, keep, let_in = opened.sigmoid().chunk(3, dim=1)
    cell = keep * cell + let_in * content.tanh()
    return let_out * cell.tanh(), cell


class RowLSTM(nn.Module):
    """Exact distribution of an image, given a class or nothing.

    Args:
        num_values: different values K of a color: 256, or the size of a codebook.
        num_channels: colors C of a position, drawn one after the other: 3 for RGB, 1 for tokens.
        channels: D, a multiple of 2 * num_channels; the state has half as many.
        num_layers: recurrent layers after the first layer, a convolution with a kernel of 7.
        kernel_size: of input-to-state, odd; a layer sees kernel_size // 2 positions to the left.
        num_classes: classes; their tables have one row more, the null label `num_classes`. None: no classes.
        embedding: of values that are "intensity" or, without an order among them, "table".
        dropout: probability, in [0, 1), on each residual branch.

    Raises:
        ValueError: when the colors can't share the state's channels equally, or kernel_size has no middle.
    """

    def __init__(
        self,
        *,
        num_values: int,
        num_channels: int,
        channels: int,
        num_layers: int,
        kernel_size: int,
        num_classes: int | None = None,
        embedding: Embedding = "intensity",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_kernel_size(kernel_size)
        if channels % (2 * num_channels):
            raise ValueError(
                f"channels {channels} must be a multiple of {2 * num_channels}: the state has half of them"
            )
        self.num_channels, self.null_label = num_channels, num_classes or 0
        self.embedding = ValueEmbedding(
            num_values=num_values, num_channels=num_channels, channels=channels, kind=embedding
        )
        self.entry = EntryLayer(self.embedding.groups, groups=color_groups(channels, num_channels=num_channels))
        self.layers = nn.ModuleList(
            RowLSTMLayer(
                channels=channels,
                num_channels=num_channels,
                kernel_size=kernel_size,
                num_labels=self.null_label + 1,
                dropout=dropout,
            )
            for _ in range(num_layers)
        )
        self.head = ValueHead(channels, num_channels=num_channels, num_values=num_values)

    def forward(self, values: Tensor, *, label: Tensor | None = None) -> Tensor:
        """Teacher-forced logits.

        Args:
            values: (B, C, H, W) int64 in [0, K); any height and width.
            label: (B,) int64 in [0, num_classes], num_classes being the null label; None stands for the null label.

        Returns:
            (B, C, H, W, K), each from the label and values before it.
        """
        label = self._label(len(values), label)
        x = self.entry(self.embedding(values))
        for layer in self.layers:
            x = layer(x, label=label)
        return self.head(x)

    @torch.no_grad()
    def start(
        self, batch_size: int, *, height: int, width: int, label: Tensor | None = None
    ) -> tuple[Tensor, GridCache]:
        """The logits (B, K) of an image's first value, and the cache for `step`."""
        label = self._label(batch_size, label)
        layers: list[CachedLayer] = [CachedEntryLayer(self.entry, batch_size=batch_size, width=width)]
        for layer in self.layers:
            assert isinstance(layer, RowLSTMLayer)
            layers.append(CachedRowLSTMLayer(layer, label=label, width=width))
        cache = GridCache(
            layers, embedding=self.embedding, head=self.head, batch_size=batch_size, height=height, width=width
        )
        return cache.logits(), cache

    @torch.no_grad()
    def step(self, values: Tensor, *, cache: GridCache) -> Tensor:
        """Append `values` (B,) to the images in `cache` and return the next logits (B, K).

        Raises:
            IndexError: when the images are complete.
        """
        cache.append(values)
        return cache.logits()

    def _label(self, batch_size: int, label: Tensor | None) -> Tensor:
        device = self.head.out.weight.device
        return label_or_null(label, batch_size=batch_size, null_label=self.null_label, device=device)


class CachedEntryLayer:
    """An `EntryLayer` at the current row of the drawing."""

    def __init__(self, layer: EntryLayer, *, batch_size: int, width: int) -> None:
        self.conv = CachedRowConv(layer.beside, batch_size=batch_size, width=width)
        self.above = CachedRowsConv(layer.above, batch_size=batch_size, width=width)
        self.nothing = layer.above.weight.new_zeros(batch_size, layer.above.out_channels, width)
        self.terms = self.nothing

    def begin_row(self, above: Tensor | None) -> Tensor | None:
        """The embedded row above, (B, I, W); recurrent layers keep the needed part."""
        self.terms = self.conv.terms(self.nothing if above is None else self.above.append(above))

    def step(self, *, column: int, color: int) -> Tensor:
        """Features of a color, (B, D / C)."""
        return self.conv.apply(column=column, color=color, bias=self.terms[color, column])


class CachedRowLSTMLayer:
    """A `RowLSTMLayer` at the current row of the drawing.

    `mix` holds the states of the row, and before a state is drawn, the state of the row above.
    """

    def __init__(self, layer: RowLSTMLayer, *, label: Tensor, width: int) -> None:
        self.layer = layer
        self.conv = CachedRowConv(layer.input_to_state, batch_size=len(label), width=width)
        self.mix = CachedRowConv(layer.mix, batch_size=len(label), width=width)
        self.label = layer.label(label)[..., 0]  # (B, 4S, 1)
        num_channels = len(self.mix.shares)
        share = len(self.mix.shares[0])
        self.cells = layer.mix.weight.new_zeros(num_channels, width, len(label), share)
        self.terms = self.cells

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
