"""Plots of several measured lines in an image, as SVG for the report and for a separate file."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from components.evaluation.curves import INK, drawn_svg, dress

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

PANEL = (4.6, 3.2)  # inches of one panel
LEGEND_ROW = 0.22  # inches
LEGEND_MARK, LEGEND_LETTER = 0.55, 0.075  # inches: what one entry needs besides its letters, and for each
# Of one lightness in the middle, so that they stand out on light and dark; the marker tells them apart too. Where there
# are more lines, a marker is hollow and has another color.
LINES = (("#2f6fd6", "o"), ("#d9661f", "s"), ("#1f9d63", "^"), ("#a34fd0", "D"), ("#d63d7c", "v"), ("#0c95a8", "P"))
DASHES = ("--", ":", "-.")
ROUND = (1, 2, 5)  # ticks of a logarithmic axis, times powers of ten


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


def plot_svg(panels: Sequence[Panel], *, salt: str) -> str:
    """Draws panels side by side under a common legend, as an `<svg>` with all numbers in the title.

    A name has one color in all panels.

    Args:
        salt: makes the ids of this image its own; two on one page may not share any.
    """
    names = list(dict.fromkeys(series.name for panel in panels for series in panel.series))
    levels = list(dict.fromkeys(name for panel in panels for name in panel.levels))
    width, longest = PANEL[0] * len(panels), max(map(len, [*names, *levels]))
    columns = max(1, int(width / (LEGEND_MARK + LEGEND_LETTER * longest)))
    legend = LEGEND_ROW * -(-(len(names) + len(levels)) // columns)
    height = PANEL[1] + legend

    def draw(figure: "Figure") -> None:
        """Draws the panels and the legend on the figure."""
        for number, panel in enumerate(panels):
            left, bottom = (number * PANEL[0] + 0.62) / width, 0.5 / height
            axes = figure.add_axes((left, bottom, (PANEL[0] - 0.75) / width, (PANEL[1] - 0.6) / height))
            _draw(axes, panel, names, levels)
        _legend(figure, [*names, *levels], columns)

    return drawn_svg(draw, size=(width, height), text="; ".join(described(panel) for panel in panels), salt=salt)


def described(panel: Panel) -> str:
    """Describes a panel in words: the points of each line, or the ends of a line with many points."""
    lines = [f"{series.name} {_points(series)}" for series in panel.series]
    lines += [f"{name} {height:.4g}" for name, height in panel.levels.items()]
    return f"{panel.y_label} against {panel.x_label}: {', '.join(lines)}"


def _points(series: Series) -> str:
    pairs = [f"{y:.4g} at {x:.4g}" for x, y in zip(series.x, series.y, strict=True)]
    return " ".join(pairs) if len(pairs) <= 12 else f"from {pairs[0]} to {pairs[-1]}"


def _legend(figure: "Figure", names: Sequence[str], columns: int) -> None:
    """Legend of all names, each once."""
    drawn = [axes.get_legend_handles_labels() for axes in figure.axes]
    marks = {label: mark for handles, labels in drawn for mark, label in zip(handles, labels, strict=True)}
    figure.legend(
        [marks[name] for name in names],
        names,
        loc="upper center",
        ncols=min(columns, len(names)),
        frameon=False,
        labelcolor=INK,
    )


def _draw(axes: "Axes", panel: Panel, names: Sequence[str], levels: Sequence[str]) -> None:
    for series in panel.series:
        again, place = divmod(names.index(series.name), len(LINES))
        color, marker = LINES[(place + 3 * again) % len(LINES)][0], LINES[place][1]
        axes.plot(
            series.x,
            series.y,
            color=color,
            linewidth=1.8,
            marker=marker if panel.markers else None,
            markersize=5,
            fillstyle="none" if again else "full",
            label=series.name,
        )
        if series.error:
            axes.errorbar(series.x, series.y, yerr=series.error, color=color, linewidth=1.2, fmt="none", capsize=2)
    for name, height in panel.levels.items():
        axes.axhline(height, color=INK, linewidth=1.2, linestyle=DASHES[levels.index(name) % len(DASHES)], label=name)
    if panel.log_x:
        axes.set_xscale("log")
        _round_ticks(axes.xaxis)
    if panel.log_y:
        axes.set_yscale("log")
        _round_ticks(axes.yaxis)
    axes.set_xlabel(panel.x_label, color=INK)
    axes.set_ylabel(panel.y_label, color=INK)
    dress(axes)


def _round_ticks(axis: "Axis") -> None:
    """1, 2, 5, 10, … in plain digits; powers of ten alone where the axis spans many."""
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1,) if high / low > 1000 else ROUND))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_locator(NullLocator())
