"""Drawings of a page as inline SVG in the colors of the page: curves of trainings, plots of measures."""

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from html import escape
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

COLORS = {  # drawn -> on the page, or in a file of its own
    "#010203": "currentColor",
    "#040506": "var(--series, #2f5fd0)",
    "#070809": "var(--rule, #dfe4ec)",
}
INK, SERIES, RULE = COLORS

MAX_POINTS = 300  # of one curve: more can't be seen
SMOOTHED_FROM = 40  # points: from here on with a running mean
CURVE = (4.2, 2.3)  # inches
# left, bottom, width, height as shares: a layout engine would take most of the time
AXES = (0.13, 0.19, 0.82, 0.77)

PANEL = (4.6, 3.2)  # inches of one panel
LEGEND_ROW = 0.22  # inches
LEGEND_MARK, LEGEND_LETTER = 0.55, 0.075  # inches: what one entry needs besides its letters, and for each
# Of one lightness in the middle, so that they stand out on light and dark; the marker tells them apart too. Where there
# are more lines, a marker is hollow and has another color.
LINES = (("#2f6fd6", "o"), ("#d9661f", "s"), ("#1f9d63", "^"), ("#a34fd0", "D"), ("#d63d7c", "v"), ("#0c95a8", "P"))
DASHES = ("--", ":", "-.")
ROUND = (1, 2, 5)  # ticks of a logarithmic axis, times powers of ten


def drawn_svg(draw: Callable[["Figure"], None], *, size: tuple[float, float], text: str, salt: str) -> str:
    """Runs `draw` on a matplotlib figure of a size in inches; returns an `<svg>` with a description.
    The element is a whole SVG file too, on which the colors of the page have fixed stand-ins. `salt` makes the ids of
    this image its own; two on one page may not share any."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context({"svg.fonttype": "none", "svg.hashsalt": salt, "font.family": "sans-serif", "font.size": 9}):
        figure, buffer = Figure(figsize=size), io.StringIO()
        FigureCanvasAgg(figure)
        draw(figure)
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    for drawn, shown in COLORS.items():
        svg = svg.replace(drawn, shown)
    view_box = svg.partition('viewBox="')[2].partition('"')[0]
    drawing = svg[svg.index("</defs>") + len("</defs>") :]  # without metadata and style
    drawing = re.sub(r'<g id="[^"]*"', "<g", drawing)  # would clash on a page
    drawing = re.sub(r"font-family: [^;]+;", "", drawing)
    spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    opening = f'<svg {spaces} viewBox="{view_box}" role="img" class="curve"'
    return f'{opening} aria-labelledby="{salt}"><title id="{salt}">{escape(text)}</title>{drawing}'


def with_own_ids(svg: str, prefix: str) -> str:
    """The same drawing with other ids, for a page with several copies or similar drawings."""
    return re.sub(r'(\bid="|\baria-labelledby="|url\(#|href="#)', rf"\g<1>{prefix}-", svg)


# Kept, because a report is drawn again as soon as its pages in MLflow are known.
@lru_cache(maxsize=512)
def curve_svg(points: tuple[tuple[int, float], ...], metric: str, *, salt: str) -> str:
    """Draws (step, value) of a metric as an `<svg>` element, with first, last and lowest value in words."""
    line = [(step, value) for step, value in sorted(points) if math.isfinite(value)]
    lowest = min((value for _, value in line), default=0.0)
    stride = max(1, math.ceil(len(line) / MAX_POINTS))
    line = line[::stride] + ([line[-1]] if line and (len(line) - 1) % stride else [])
    steps, values = [step for step, _ in line], [value for _, value in line]
    text = f"{metric}: no finite value"
    if values:
        ends = f"from {values[0]:.4g} to {values[-1]:.4g}, lowest {lowest:.4g}"
        text = f"{metric.replace('_', ' ')} over {steps[-1]} steps: {ends}"

    def draw(figure: "Figure") -> None:  # many points faintly, below their running mean
        from matplotlib.ticker import MaxNLocator

        axes, smooth = figure.add_axes(AXES), len(values) >= SMOOTHED_FROM
        look = {"linewidth": 1.0 if smooth else 1.8, "alpha": 0.35 if smooth else 1}
        axes.plot(steps, values, color=SERIES, marker="o" if len(values) < 3 else None, **look)
        if smooth:
            axes.plot(steps, running_mean(values, width=len(values) // 15), color=SERIES, linewidth=1.8)
        if len(values) > 2 and min(values) > 0 and max(values) / min(values) > 100:
            axes.set_yscale("log")
        axes.set_xlabel("step", color=INK)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
        axes.margins(x=0.01)
        _dress(axes)

    return drawn_svg(draw, size=CURVE, text=text, salt=salt)


def running_mean(values: Sequence[float], *, width: int) -> list[float]:
    """Mean over the last `width` values (fewer at the start)."""
    parts = [values[max(0, end - width) : end] for end in range(1, len(values) + 1)]
    return [sum(part) / len(part) for part in parts]


def _dress(axes: "Axes") -> None:
    axes.tick_params(colors=INK, which="both", length=0)
    axes.grid(color=RULE, linewidth=0.8)
    for spine in axes.spines.values():
        spine.set_visible(False)


class Series(NamedTuple):
    """A line of a plot: y at each x, in the order of drawing."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    error: Sequence[float] = ()  # standard errors of y, drawn as bars


class Panel(NamedTuple):
    """A plot of several lines, with axis labels, and dashed levels to compare with."""

    x_label: str
    y_label: str
    series: Sequence[Series]
    levels: Mapping[str, float] = {}  # name -> height of a dashed line to compare with
    log_x: bool = False
    log_y: bool = False
    markers: bool = True

    @property
    def text(self) -> str:
        """The panel in words: the points of each line, or the ends of a line with many points."""
        lines = []
        for series in self.series:
            pairs = [f"{y:.4g} at {x:.4g}" for x, y in zip(series.x, series.y, strict=True)]
            ends = pairs if len(pairs) <= 12 else ["from", pairs[0], "to", pairs[-1]]
            lines.append(" ".join([series.name, *ends]))
        lines += [f"{name} {height:.4g}" for name, height in self.levels.items()]
        return f"{self.y_label} against {self.x_label}: {', '.join(lines)}"


def plot_svg(panels: Sequence[Panel], *, salt: str, across: int | None = None) -> str:
    """Draws panels side by side under a common legend, as an `<svg>` with all numbers in the title.
    A name has one color in all panels. `salt` is as in `drawn_svg`; `across`: panels of a row, None: all."""
    across = min(across or len(panels), len(panels))
    names = list(dict.fromkeys(series.name for panel in panels for series in panel.series))
    levels = list(dict.fromkeys(name for panel in panels for name in panel.levels))
    width, longest = PANEL[0] * across, max(map(len, [*names, *levels]))
    columns = max(1, int(width / (LEGEND_MARK + LEGEND_LETTER * longest)))
    height = PANEL[1] * (rows := -(-len(panels) // across)) + LEGEND_ROW * -(-(len(names) + len(levels)) // columns)

    def draw(figure: "Figure") -> None:
        for number, panel in enumerate(panels):
            left = (number % across * PANEL[0] + 0.62) / width
            bottom = ((rows - 1 - number // across) * PANEL[1] + 0.5) / height
            axes = figure.add_axes((left, bottom, (PANEL[0] - 0.75) / width, (PANEL[1] - 0.6) / height))
            _draw_panel(axes, panel, names, levels)
        _legend(figure, [*names, *levels], columns)

    return drawn_svg(draw, size=(width, height), text="; ".join(panel.text for panel in panels), salt=salt)


def _legend(figure: "Figure", names: Sequence[str], columns: int) -> None:
    marks = {}
    for axes in figure.axes:
        marks |= {mark.get_label(): mark for mark in axes.get_legend_handles_labels()[0]}
    lines, columns = [marks[name] for name in names], min(columns, len(names))
    figure.legend(lines, names, loc="upper center", ncols=columns, frameon=False, labelcolor=INK)


def _draw_panel(axes: "Axes", panel: Panel, names: Sequence[str], levels: Sequence[str]) -> None:
    for series in panel.series:
        again, place = divmod(names.index(series.name), len(LINES))
        color, marker = LINES[(place + 3 * again) % len(LINES)][0], LINES[place][1] if panel.markers else None
        look = {"marker": marker, "markersize": 5, "fillstyle": "none" if again else "full"}
        axes.plot(series.x, series.y, color=color, linewidth=1.8, label=series.name, **look)
        if series.error:
            axes.errorbar(series.x, series.y, yerr=series.error, color=color, linewidth=1.2, fmt="none", capsize=2)
    for name, height in panel.levels.items():
        dashes = DASHES[levels.index(name) % len(DASHES)]
        axes.axhline(height, color=INK, linewidth=1.2, linestyle=dashes, label=name)
    if panel.log_x:
        axes.set_xscale("log")
        _round_ticks(axes.xaxis)
    if panel.log_y:
        axes.set_yscale("log")
        _round_ticks(axes.yaxis)
    axes.set_xlabel(panel.x_label, color=INK)
    axes.set_ylabel(panel.y_label, color=INK)
    _dress(axes)


def _round_ticks(axis: "Axis") -> None:
    """1, 2, 5, 10, … in plain digits; powers of ten alone where the axis spans many."""
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1,) if high / low > 1000 else ROUND))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_locator(NullLocator())
