"""Masked convolutions, blind to later values, and the cache that draws an image value by value.

The order is that of van den Oord et al. 2016, "Pixel Recurrent Neural Networks": row by row, from left to right, and at
each position color by color. Every feature channel belongs to one color. At a position, channels of color o see of the
input the colors below o (mask A, the first layer) or up to o (mask B, all others): section 3.4 and figure 4. No
position is computed twice: what a layer takes from the rows above is computed once a row; what it takes from the row
itself, for one color of one position at a time, by matrices that hold the masked weights.

Shapes: B batch, C num_channels (colors), H W height and width, K num_values, I O channels in and out."""

from collections.abc import Sequence
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from components.models.devices import autocast
from components.models.layers import logits_of

Groups = tuple[int, ...]  # the color of each channel
Embedding = Literal["intensity", "table"]

FIRST_KERNEL_SIZE = 7  # of the layer with mask A, in both papers
NO_COLOR = -1  # a channel that says nothing of the image; all may see it


def color_groups(channels: int, *, num_channels: int, parts: int = 1) -> Groups:
    """The colors of `parts` times `channels` channels: each part equally many a color, ascending.
    Raises ValueError when the colors can't share the channels equally."""
    if channels % num_channels:
        raise ValueError(f"{num_channels} colors can't share {channels} channels equally")
    return tuple(channel * num_channels // channels for _ in range(parts) for channel in range(channels))


class RowConv2d(nn.Conv2d):
    """Masked convolution over a position and `reach` positions to the left, (B, I, H, W) -> (B, O, H, W)."""

    mask: Tensor

    def __init__(self, in_groups: Groups, out_groups: Groups, *, reach: int = 0, mask: Literal["A", "B"] = "B") -> None:
        super().__init__(len(in_groups), len(out_groups), (1, reach + 1))
        self.in_groups, self.out_groups, self.reach = in_groups, out_groups, reach
        seen, seeing = torch.tensor(in_groups), torch.tensor(out_groups)[:, None]
        visible = torch.ones_like(self.weight.detach())
        visible[:, :, 0, -1] = (seen < seeing if mask == "A" else seen <= seeing).to(visible.dtype)
        self.register_buffer("mask", visible, persistent=False)

    def masked_weight(self) -> Tensor:
        return self.weight * self.mask  # (O, I, 1, reach + 1)

    def forward(self, input: Tensor) -> Tensor:
        return F.conv2d(F.pad(input, (self.reach, 0)), self.masked_weight(), self.bias)


class RowsConv2d(nn.Conv2d):
    """Convolution over `rows` rows up to the position's own row, (B, I, H, W) -> (B, O, H, W).
    It sees to the right in its own row too: shift its output down before anything uses it."""

    def __init__(self, in_channels: int, out_channels: int, *, rows: int, kernel_size: int) -> None:
        super().__init__(in_channels, out_channels, (rows, kernel_size))
        self.rows, self.reach = rows, kernel_size // 2

    def forward(self, input: Tensor) -> Tensor:
        return F.conv2d(F.pad(input, (self.reach, self.reach, self.rows - 1, 0)), self.weight, self.bias)


def shift_down(x: Tensor) -> Tensor:
    """Shift (B, I, H, W) down by a row: zeros come in, the last row leaves."""
    return F.pad(x, (0, 0, 1, -1))


class ValueEmbedding(nn.Module):
    """Values of an image as channels, each for a single color.
    Kind "intensity" scales values to [-1, 1] and adds a channel of ones, which tells mid-gray from the zeros outside
    the image (Salimans et al. 2017, "PixelCNN++"); "table" learns a vector a value, `channels` for all colors."""

    weight: Tensor  # (K, I / C)

    def __init__(self, *, num_values: int, num_channels: int, channels: int, kind: Embedding) -> None:
        super().__init__()
        if kind == "table":
            self.groups = color_groups(channels, num_channels=num_channels)
            self.weight = nn.Parameter(torch.randn(num_values, channels // num_channels))
        else:
            self.groups = (NO_COLOR, *range(num_channels))
            self.register_buffer("weight", torch.linspace(-1, 1, num_values)[:, None], persistent=False)

    def lookup(self, values: Tensor) -> Tensor:
        """(…) int64 in [0, K) -> (…, I / C)."""
        return F.embedding(values, self.weight)

    def forward(self, values: Tensor) -> Tensor:  # (B, C, H, W) -> (B, I, H, W)
        x = rearrange(self.lookup(values), "b c h w i -> b (c i) h w")
        return F.pad(x, (0, 0, 0, 0, 1, 0), value=1.0) if self.groups[0] == NO_COLOR else x


class ValueHead(nn.Module):
    """Two pointwise layers with mask B, to logits: (B, I, H, W) -> (B, C, H, W, K)."""

    def __init__(self, channels: int, *, num_channels: int, num_values: int) -> None:
        super().__init__()
        self.num_channels = num_channels
        groups = color_groups(channels, num_channels=num_channels)
        self.hidden = RowConv2d(groups, groups)
        self.out = RowConv2d(groups, color_groups(num_channels * num_values, num_channels=num_channels))

    def forward(self, x: Tensor) -> Tensor:
        logits = logits_of(self.out, F.relu(self.hidden(F.relu(x))))
        return rearrange(logits, "b (c k) h w -> b c h w k", c=self.num_channels)


class LabelBias(nn.Embedding):
    """Bias of a class at every position, label (B,) -> (B, O, 1, 1); the last row is the null label."""

    def __init__(self, num_labels: int, channels: int) -> None:
        super().__init__(num_labels, channels)
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input)[:, :, None, None]


class CachedRowConv:
    """A `RowConv2d` along a row, for one color of one position at a time; buffers are allocated once."""

    def __init__(self, conv: RowConv2d, *, batch_size: int, width: int) -> None:
        self.num_inputs, self.start = conv.in_channels, conv.reach * conv.in_channels
        self.window = self.start + self.num_inputs
        self.inputs = conv.weight.new_zeros(batch_size, self.start + width * self.num_inputs)
        free = _places(conv.in_groups, NO_COLOR)
        self.inputs.view(batch_size, -1, self.num_inputs)[:, conv.reach :, free] = 1
        colors = range(max(conv.out_groups) + 1)
        self.shares = [_places(conv.in_groups, color) for color in colors]  # consecutive
        self.rows = [_places(conv.out_groups, color) for color in colors]
        weight, bias = conv.masked_weight()[:, :, 0], conv.bias  # (O, I, reach + 1), (O,)
        assert bias is not None
        self.matrices = [rearrange(weight[rows], "o i t -> (t i) o").contiguous() for rows in self.rows]
        self.biases = [bias[rows] for rows in self.rows]

    def read(self, *, column: int, color: int) -> Tensor:
        """The input channels of a color, (B, I / C), at a position: a view."""
        places = self.shares[color]
        first = self.start + column * self.num_inputs + places[0]
        return self.inputs[:, first : first + len(places)]

    def write(self, x: Tensor, *, column: int, color: int) -> None:
        self.read(column=column, color=color).copy_(x)

    def apply(self, *, column: int, color: int, bias: Tensor | None = None) -> Tensor:
        """The output channels of a color, (B, O / C); `bias` stands for the convolution's own."""
        first = column * self.num_inputs
        inputs = self.inputs[:, first : first + self.window]
        return torch.addmm(self.biases[color] if bias is None else bias, inputs, self.matrices[color])

    def row(self) -> Tensor:
        """The whole row of inputs, (B, I, W)."""
        return rearrange(self.inputs[:, self.start :], "b (w i) -> b i w", i=self.num_inputs)

    def terms(self, x: Tensor) -> Tensor:
        """Contribution of a row above, (B, O, W), and the bias to outputs, for `apply`: (C, W, B, O / C)."""
        colors = zip(self.rows, self.biases, strict=True)
        return torch.stack([rearrange(x[:, rows], "b o w -> w b o") + bias for rows, bias in colors])


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
        """The layer's output for a color of a position, (B, I / C)."""


class GridCache:
    """An image in the course of drawing: `index` of the C * H * W values are known."""

    def __init__(
        self, network: "PixelNetwork", layers: Sequence[CachedLayer], *, batch_size: int, height: int, width: int
    ) -> None:
        self.layers, self.embedding, head = layers, network.embedding, network.head
        self.head = [CachedRowConv(conv, batch_size=batch_size, width=1) for conv in (head.hidden, head.out)]
        self.num_channels, self.width, self.total = network.num_channels, width, network.num_channels * height * width
        self.index = 0

    def append(self, values: Tensor) -> None:
        """Make the next value of each image, (B,), known.
        Raises IndexError when nothing depends on it: it is the last one."""
        if self.index + 1 >= self.total:
            raise IndexError(f"the cache is full: an image has {self.total} values")
        column, color = self._place()
        self.layers[0].conv.write(self.embedding.lookup(values), column=column, color=color)
        self.index += 1

    def logits(self) -> Tensor:
        """Logits (B, K) of the next value."""
        column, color = self._place()
        if column == 0 and color == 0:
            above = self.layers[0].conv.row() if self.index > 0 else None
            for layer in self.layers:
                above = layer.begin_row(above)
        for layer, following in zip(self.layers, self.layers[1:], strict=False):
            following.conv.write(layer.step(column=column, color=color), column=column, color=color)
        x = self.layers[-1].step(column=column, color=color)
        with autocast(x.device, enabled=False):  # logits in fp32
            for conv in self.head:
                conv.write(F.relu(x), column=0, color=color)
                x = conv.apply(column=0, color=color)
        return x

    def _place(self) -> tuple[int, int]:
        position, color = divmod(self.index, self.num_channels)
        return position % self.width, color


def _places(groups: Groups, color: int) -> list[int]:
    return [channel for channel, group in enumerate(groups) if group == color]


class PixelNetwork(nn.Module):
    """Exact distribution of an image, given a class or nothing: the base class of both networks.

    Args:
        num_values: different values K of a color: 256, or the size of a codebook.
        num_channels: colors C of a position, drawn one after the other: 3 for RGB, 1 for tokens.
        channels: of features, a multiple of num_channels.
        kernel_size: odd; a layer sees kernel_size // 2 positions to each of its sides.
        num_classes: classes; their tables have one row more, the null label `num_classes`. None: no classes.
        embedding: of values that are "intensity" or, without an order among them, "table".

    Raises ValueError when the colors can't share the channels equally, or kernel_size has no middle."""

    head: ValueHead

    def __init__(
        self,
        *,
        num_values: int,
        num_channels: int,
        channels: int,
        kernel_size: int,
        num_classes: int | None = None,
        embedding: Embedding = "intensity",
    ) -> None:
        super().__init__()
        if kernel_size < 3 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd and at least 3, not {kernel_size}")
        self.groups = color_groups(channels, num_channels=num_channels)
        self.num_channels, self.num_values, self.null_label = num_channels, num_values, num_classes or 0
        self.embedding = ValueEmbedding(
            num_values=num_values, num_channels=num_channels, channels=channels, kind=embedding
        )

    def features(self, x: Tensor, *, label: Tensor) -> Tensor:
        """Embedded values (B, I, H, W) and labels (B,) -> input of the head, (B, D, H, W)."""
        raise NotImplementedError

    def cached_layers(self, *, label: Tensor, width: int) -> list[CachedLayer]:
        """The layers at the first row of a drawing, for labels (B,)."""
        raise NotImplementedError

    def forward(self, values: Tensor, *, label: Tensor | None = None) -> Tensor:
        """Teacher-forced logits.
        `values` are (B, C, H, W) int64 in [0, K), of any height and width, `label` (B,) int64 in [0, num_classes], the
        last or None being the null label. Returns (B, C, H, W, K), each from the label and the values before it."""
        return self.head(self.features(self.embedding(values), label=self._label(values.shape[0], label)))

    @torch.no_grad()
    def start(
        self, batch_size: int, *, height: int, width: int, label: Tensor | None = None
    ) -> tuple[Tensor, GridCache]:
        """The logits (B, K) of an image's first value, and the cache for `step`."""
        layers = self.cached_layers(label=self._label(batch_size, label), width=width)
        cache = GridCache(self, layers, batch_size=batch_size, height=height, width=width)
        return cache.logits(), cache

    @torch.no_grad()
    def step(self, values: Tensor, *, cache: GridCache) -> Tensor:
        """Append `values` (B,) to the images in `cache` and return the next logits (B, K).
        Raises IndexError when the images are complete."""
        cache.append(values)
        return cache.logits()

    def _label(self, batch_size: int, label: Tensor | None) -> Tensor:
        device = self.head.out.weight.device
        return torch.full((batch_size,), self.null_label, device=device) if label is None else label
