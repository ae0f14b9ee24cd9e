"""Gated PixelCNN (van den Oord et al. 2016, "Conditional Image Generation with PixelCNN Decoders").

Shapes: B batch, C num_channels (colors), H W height and width, K num_values, I channels into a layer, D channels.
"""

import torch
from torch import Tensor, nn

from components.models.layers import NetworkBlock
from components.models.masked import (
    FIRST_KERNEL_SIZE,
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


class GatedLayer(NetworkBlock):
    """A gated layer of two stacks (figure 2): the vertical sees rows above, the horizontal the row.

    Together the stacks see everything that comes before: there is no blind spot. Mask A (`first`) has no residual,
    because a residual would show a position to itself.
    """

    def __init__(
        self, in_groups: Groups, *, groups: Groups, kernel_size: int, num_labels: int, dropout: float, first: bool
    ) -> None:
        super().__init__()
        channels = len(groups)
        self.first = first
        self.vertical = RowsConv2d(len(in_groups), 2 * channels, rows=kernel_size // 2 + 1, kernel_size=kernel_size)
        self.vertical_label = LabelBias(num_labels, 2 * channels)
        self.link = nn.Conv2d(2 * channels, 2 * channels, 1)  # no mask: the colors of rows above may all be seen
        self.horizontal = RowConv2d(in_groups, groups + groups, reach=kernel_size // 2, mask="A" if first else "B")
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


class GatedPixelCNN(nn.Module):
    """Exact distribution of an image, given a class or nothing.

    Args:
        num_values: different values K of a color: 256, or the size of a codebook.
        num_channels: colors C of a position, drawn one after the other: 3 for RGB, 1 for tokens.
        channels: D, a multiple of num_channels.
        num_layers: gated layers after the first one, which has a kernel of 7.
        kernel_size: odd; a layer sees kernel_size // 2 positions to each side.
        num_classes: classes; their tables have one row more, the null label `num_classes`. None: no classes.
        embedding: of values that are "intensity" or, without an order among them, "table".
        dropout: probability, in [0, 1), after each gate.

    Raises:
        ValueError: when the colors can't share the channels equally, or kernel_size has no middle.
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
        groups = color_groups(channels, num_channels=num_channels)
        self.num_channels, self.null_label = num_channels, num_classes or 0
        self.embedding = ValueEmbedding(
            num_values=num_values, num_channels=num_channels, channels=channels, kind=embedding
        )
        self.layers = nn.ModuleList(
            GatedLayer(
                groups if i > 0 else self.embedding.groups,
                groups=groups,
                kernel_size=kernel_size if i > 0 else FIRST_KERNEL_SIZE,
                num_labels=self.null_label + 1,
                dropout=dropout,
                first=i == 0,
            )
            for i in range(num_layers + 1)
        )
        self.head = ValueHead(channels, num_channels=num_channels, num_values=num_values)

    def forward(self, values: Tensor, *, label: Tensor | None = None) -> Tensor:
        """Teacher-forced logits.

        Args:
            values: (B, C, H, W) int64 in [0, K); any height and width.
            label: (B,) int64 in [0, num_classes], num_classes being the null label; None stands for the null label.

        Returns:
            (B, C, H, W, K), each from the label and the values before it.
        """
        label = self._label(len(values), label)
        vertical = horizontal = self.embedding(values)
        for layer in self.layers:
            vertical, horizontal = layer(vertical, horizontal, label=label)
        return self.head(horizontal)

    @torch.no_grad()
    def start(
        self, batch_size: int, *, height: int, width: int, label: Tensor | None = None
    ) -> tuple[Tensor, GridCache]:
        """The logits (B, K) of an image's first value, and the cache for `step`."""
        label = self._label(batch_size, label)
        cache = GridCache(
            [CachedGatedLayer(layer, label=label, width=width) for layer in self._gated_layers()],
            embedding=self.embedding,
            head=self.head,
            batch_size=batch_size,
            height=height,
            width=width,
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

    def _gated_layers(self) -> list[GatedLayer]:
        return [layer for layer in self.layers if isinstance(layer, GatedLayer)]

    def _label(self, batch_size: int, label: Tensor | None) -> Tensor:
        device = self.head.out.weight.device
        return label_or_null(label, batch_size=batch_size, null_label=self.null_label, device=device)


class CachedGatedLayer:
    """A `GatedLayer` at the current row of the drawing."""

    def __init__(self, layer: GatedLayer, *, label: Tensor, width: int) -> None:
        self.layer = layer
        self.conv = CachedRowConv(layer.horizontal, batch_size=len(label), width=width)
        self.mix = CachedRowConv(layer.mix, batch_size=len(label), width=1)
        self.vertical = CachedRowsConv(layer.vertical, batch_size=len(label), width=width)
        self.vertical_label = layer.vertical_label(label)[..., 0]  # (B, 2D, 1)
        self.horizontal_label = layer.horizontal_label(label)[..., 0]
        self.nothing = layer.link.weight.new_zeros(len(label), layer.link.in_channels, width)
        self.terms = self.nothing

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
