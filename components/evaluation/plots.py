"""Drawings of a page as inline SVG in the colors of the page, light or dark.

A training's curves, plots of several measured lines, and the workflow as a layered graph.
"""

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

Points = Sequence[tuple[int, dict[str, float]]]  # (step, {metric: value})

COLORS = {  # drawn -> on the page, or in a file of its own
    "#010203": "currentColor",
    "#040506": "var(--series, #2f5fd0)",
    "#070809": "var(--rule, #dfe4ec)",
}
INK, SERIES, RULE = COLORS

MAX_POINTS = 300  # of one curve: more can't be seen
SMOOTHED_FROM = 40  # points: from here on a running mean is drawn over the raw curve
CURVE = (4.2, 2.3)  # inches
AXES = (0.13, 0.19, 0.82, 0.77)  # left, bottom, width, height as shares: a layout engine would take most of the time

PANEL = (4.6, 3.2)  # inches of one panel
LEGEND_ROW = 0.22  # inches
LEGEND_MARK, LEGEND_LETTER = 0.55, 0.075  # inches: what one entry needs besides its letters, and for each
# Of one lightness in the middle, so that they stand out on light and dark; the marker tells them apart too. Where there
# are more lines, a marker is hollow and has another color.
LINES = (("#2f6fd6", "o"), ("#d9661f", "s"), ("#1f9d63", "^"), ("#a34fd0", "D"), ("#d63d7c", "v"), ("#0c95a8", "P"))
DASHES = ("--", ":", "-.")
ROUND = (1, 2, 5)  # ticks of a logarithmic axis, times powers of ten

BOX_WIDTH, BOX_HEIGHT = 140, 50
COLUMN, ROW = 156, 88  # distance of neighboring boxes
MARGIN = 8


def drawn_svg(draw: Callable[["Figure"], None], *, size: tuple[float, float], text: str, salt: str) -> str:
    """Runs `draw` on a matplotlib figure and returns an `<svg>` element with a description.

    The element is a whole SVG file too, on which the colors of the page have fixed stand-ins.

    Args:
        size: inches.
        text: the drawing in words.
        salt: makes the ids of this image its own; two on one page may not share any.
    """
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
    view_box = re.search(r'viewBox="([^"]+)"', svg)
    assert view_box is not None
    drawing = svg[svg.index("</defs>") + len("</defs>") :]  # behind matplotlib's metadata and page-wide style
    drawing = re.sub(r'<g id="[^"]*"', "<g", drawing)  # the same in each image: two on one page would clash
    drawing = re.sub(r"font-family: [^;]+;", "", drawing)
    spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    opening = f'<svg {spaces} viewBox="{view_box[1]}" role="img" class="curve"'
    return f'{opening} aria-labelledby="{salt}"><title id="{salt}">{escape(text)}</title>{drawing}'


def with_own_ids(svg: str, prefix: str) -> str:
    """The same drawing with other ids, for a page with several copies or similar drawings."""
    return re.sub(r'(\bid="|\baria-labelledby="|url\(#|href="#)', rf"\g<1>{prefix}-", svg)


def metric_names(points: Points) -> list[str]:
    """Names of the reported metrics, losses first, each group in the order of first report."""
    names = list(dict.fromkeys(name for _, values in points for name in values))
    return sorted(names, key=lambda name: (name != "loss", "loss" not in name and "bits" not in name))


def curve_svg(points: Points, metric: str, *, salt: str) -> str:
    """Draws a metric over the steps as an `<svg>` element, with first, last and lowest value in words."""
    told = [(step, values[metric]) for step, values in sorted(points, key=lambda point: point[0]) if metric in values]
    line = [(step, value) for step, value in told if math.isfinite(value)]
    stride = max(1, math.ceil(len(line) / MAX_POINTS))
    line = line[::stride] + ([line[-1]] if line and (len(line) - 1) % stride else [])
    steps, values = [step for step, _ in line], [value for _, value in line]
    text = f"{metric}: no finite value"
    if values:
        ends = f"from {values[0]:.4g} to {values[-1]:.4g}, lowest {min(values):.4g}"
        text = f"{metric.replace('_', ' ')} over {steps[-1]} steps: {ends}"

    def draw(figure: "Figure") -> None:
        """Draws the curve on the only axes of the figure; many points faintly, below their running mean."""
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
    """Ticks, grid and frame in the colors of the page."""
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


def plot_svg(panels: Sequence[Panel], *, salt: str) -> str:
    """Draws panels side by side under a common legend, as an `<svg>` with all numbers in the title.
    A name has one color in all panels. `salt` is as in `drawn_svg`."""
    names = list(dict.fromkeys(series.name for panel in panels for series in panel.series))
    levels = list(dict.fromkeys(name for panel in panels for name in panel.levels))
    width, longest = PANEL[0] * len(panels), max(map(len, [*names, *levels]))
    columns = max(1, int(width / (LEGEND_MARK + LEGEND_LETTER * longest)))
    height = PANEL[1] + LEGEND_ROW * -(-(len(names) + len(levels)) // columns)

    def draw(figure: "Figure") -> None:
        """Draws the panels and the legend on the figure."""
        for number, panel in enumerate(panels):
            left, bottom = (number * PANEL[0] + 0.62) / width, 0.5 / height
            axes = figure.add_axes((left, bottom, (PANEL[0] - 0.75) / width, (PANEL[1] - 0.6) / height))
            _draw_panel(axes, panel, names, levels)
        _legend(figure, [*names, *levels], columns)

    return drawn_svg(draw, size=(width, height), text="; ".join(panel.text for panel in panels), salt=salt)


def _legend(figure: "Figure", names: Sequence[str], columns: int) -> None:
    """Legend of all names, each once."""
    drawn = [axes.get_legend_handles_labels() for axes in figure.axes]
    marks = {label: mark for handles, labels in drawn for mark, label in zip(handles, labels, strict=True)}
    lines, columns = [marks[name] for name in names], min(columns, len(names))
    figure.legend(lines, names, loc="upper center", ncols=columns, frameon=False, labelcolor=INK)


def _draw_panel(axes: "Axes", panel: Panel, names: Sequence[str], levels: Sequence[str]) -> None:
    for series in panel.series:
        again, place = divmod(names.index(series.name), len(LINES))
        color, marker = LINES[(place + 3 * again) % len(LINES)][0], LINES[place][1] if panel.markers else None
        look = {"marker": marker, "markersize": 5, "fillstyle": "none" if again else "full", "label": series.name}
        axes.plot(series.x, series.y, color=color, linewidth=1.8, **look)
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
    _dress(axes)


def _round_ticks(axis: "Axis") -> None:
    """1, 2, 5, 10, … in plain digits; powers of ten alone where the axis spans many."""
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1,) if high / low > 1000 else ROUND))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_locator(NullLocator())


class Node(NamedTuple):
    """A box of the graph: a stage with state, detail and inputs."""

    name: str
    state: str  # a CSS class too
    detail: str  # second line
    inputs: Sequence[str]  # names of the nodes above


def graph_svg(nodes: Sequence[Node], *, title: str) -> str:
    """Draws nodes, listed after all inputs, as an `<svg>`; lines implied by longer paths are left out."""
    if not nodes:
        return ""
    parents = direct_parents({node.name: node.inputs for node in nodes})
    places = place(parents)
    left, right = min(x for x, _ in places.values()), max(x for x, _ in places.values())
    centers = {
        name: (MARGIN + BOX_WIDTH / 2 + (x - left) * COLUMN, MARGIN + BOX_HEIGHT / 2 + y * ROW)
        for name, (x, y) in places.items()
    }
    width = 2 * MARGIN + BOX_WIDTH + (right - left) * COLUMN
    height = 2 * MARGIN + BOX_HEIGHT + max(y for _, y in places.values()) * ROW
    lines = [_edge(centers[parent], centers[name]) for name, above in parents.items() for parent in above]
    boxes = [_box(node, *centers[node.name]) for node in nodes]
    words = f"{title}: " + "; ".join(
        f"{node.name} ({node.state}, {node.detail or 'no time'}) from {', '.join(node.inputs) or 'nothing'}"
        for node in nodes
    )
    return (
        f'<svg class="graph" role="img" viewBox="0 0 {width:g} {height:g}" style="max-width:{width:g}px" '
        f'aria-labelledby="graph-title"><title id="graph-title">{escape(words)}</title>{"".join(lines + boxes)}</svg>'
    )


def direct_parents(inputs: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Inputs of each node that no other input already implies (transitive reduction)."""
    above, direct = dict[str, set[str]](), dict[str, list[str]]()
    for name, parents in inputs.items():
        known = [parent for parent in dict.fromkeys(parents) if parent in above]
        reached = set().union(*(above[parent] for parent in known))
        direct[name] = [parent for parent in known if parent not in reached]
        above[name] = reached | set(known)
    return direct


def place(parents: Mapping[str, Sequence[str]]) -> dict[str, tuple[float, int]]:
    """(column, row) of each node: a row below the lowest parent; children spread below a common parent.
    A node takes the middle of the places below its parents, or the nearest to the right with enough room."""
    children = {name: [child for child, above in parents.items() if name in above] for name in parents}
    places: dict[str, tuple[float, int]] = {}
    for name, above in parents.items():
        row = 1 + max((places[parent][1] for parent in above), default=-1)
        below = [places[p][0] + children[p].index(name) - (len(children[p]) - 1) / 2 for p in above]
        column = sum(below) / max(1, len(above))
        while any(abs(column - other) < 1 for other, level in places.values() if level == row):
            column += 0.5
        places[name] = (column, row)
    return places


def _edge(start: tuple[float, float], end: tuple[float, float]) -> str:
    top, bottom = start[1] + BOX_HEIGHT / 2, end[1] - BOX_HEIGHT / 2
    bend = min(ROW - BOX_HEIGHT, bottom - top)
    turn = bottom - bend
    return (
        f'<path class="edge" d="M{start[0]:g} {top:g}V{turn:g}'
        f'C{start[0]:g} {turn + bend / 2:g} {end[0]:g} {turn + bend / 2:g} {end[0]:g} {bottom:g}"/>'
    )


def _box(node: Node, middle: float, center: float) -> str:
    x, y = middle - BOX_WIDTH / 2, center - BOX_HEIGHT / 2
    return (
        f'<g class="node {escape(node.state)}"><rect x="{x:g}" y="{y:g}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" '
        f'rx="10"/><text x="{middle:g}" y="{center - 3:g}" class="name">{escape(node.name.replace("_", " "))}'
        f'</text><text x="{middle:g}" y="{center + 15:g}" class="detail">{escape(node.detail)}</text></g>'
    )
