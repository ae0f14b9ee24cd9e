"""Curves of a training as inline SVG in the colors of the page (light or dark)."""

import io
import math
import re
from collections.abc import Callable, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Points = Sequence[tuple[int, dict[str, float]]]  # (step, {metric: value})

MAX_POINTS = 300  # of one line: more can't be seen
SMOOTHED_FROM = 40  # points: from here on a running mean is drawn over the raw line
SIZE = (4.2, 2.3)  # inches
AXES = (0.13, 0.19, 0.82, 0.77)  # left, bottom, width, height as shares: a layout engine would take most of the time
COLORS = {  # drawn -> on the page, or in a file of its own
    "#010203": "currentColor",
    "#040506": "var(--series, #2f5fd0)",
    "#070809": "var(--rule, #dfe4ec)",
}
INK, SERIES, RULE = COLORS


def metric_names(points: Points) -> list[str]:
    """Names of the reported metrics, losses first, each group in the order of first report."""
    names = list(dict.fromkeys(name for _, values in points for name in values))
    return sorted(names, key=lambda name: (name != "loss", "loss" not in name and "bits" not in name))


def curve_svg(points: Points, metric: str, *, salt: str) -> str:
    """Draws a metric over the steps as an `<svg>` element, with a text for screen readers.

    Args:
        salt: makes the ids of this image its own; two inline images may not share any.
    """
    steps, values = _line(points, metric)

    def draw(figure: "Figure") -> None:
        """Draws the curve on the only axes of the figure."""
        _draw(figure.add_axes(AXES), steps, values)

    return drawn_svg(draw, size=SIZE, text=described(metric, steps, values), salt=salt)


def drawn_svg(draw: Callable[["Figure"], None], *, size: tuple[float, float], text: str, salt: str) -> str:
    """Runs `draw` on a matplotlib figure and returns an `<svg>` element with a description.

    `size` is in inches, and `text` is the description of the drawing.

    The element is a whole SVG file too, on which the colors of the page have fixed stand-ins.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context({"svg.fonttype": "none", "svg.hashsalt": salt, "font.family": "sans-serif", "font.size": 9}):
        figure = Figure(figsize=size)
        FigureCanvasAgg(figure)
        draw(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _inline(buffer.getvalue(), text, salt)


def described(metric: str, steps: Sequence[int], values: Sequence[float]) -> str:
    """The curve in words: first, last and lowest value."""
    if not values:
        return f"{metric}: no finite value"
    return (
        f"{metric.replace('_', ' ')} over {steps[-1]} steps: from {values[0]:.4g} to {values[-1]:.4g}, "
        f"lowest {min(values):.4g}"
    )


def last_value(points: Points, metric: str) -> float | None:
    """The last reported value of a metric."""
    return next((values[metric] for _, values in reversed(points) if metric in values), None)


def is_constant(points: Points, metric: str) -> bool:
    """True if a metric never changes, and so shows a switch that is off rather than a curve."""
    return len({values[metric] for _, values in points if metric in values}) == 1 < len(points)


def _line(points: Points, metric: str) -> tuple[list[int], list[float]]:
    found = [(step, values[metric]) for step, values in sorted(points, key=lambda point: point[0]) if metric in values]
    found = [(step, value) for step, value in found if math.isfinite(value)]
    stride = max(1, math.ceil(len(found) / MAX_POINTS))
    kept = found[::stride] + ([found[-1]] if found and (len(found) - 1) % stride else [])
    return [step for step, _ in kept], [value for _, value in kept]


def _draw(axes: "Axes", steps: list[int], values: list[float]) -> None:
    from matplotlib.ticker import MaxNLocator

    smooth = len(values) >= SMOOTHED_FROM
    marker = "o" if len(values) < 3 else None
    axes.plot(steps, values, color=SERIES, linewidth=1.0 if smooth else 1.8, alpha=0.35 if smooth else 1, marker=marker)
    if smooth:
        axes.plot(steps, running_mean(values, width=len(values) // 15), color=SERIES, linewidth=1.8)
    if _spans_decades(values):
        axes.set_yscale("log")
    axes.set_xlabel("step", color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    axes.margins(x=0.01)
    dress(axes)


def dress(axes: "Axes") -> None:
    """Ticks, grid and frame in the colors of the page."""
    axes.tick_params(colors=INK, which="both", length=0)
    axes.grid(color=RULE, linewidth=0.8)
    for spine in axes.spines.values():
        spine.set_visible(False)


def running_mean(values: Sequence[float], *, width: int) -> list[float]:
    """Mean over the last `width` values (fewer at the start)."""
    parts: list[Any] = [values[max(0, end - width) : end] for end in range(1, len(values) + 1)]
    return [sum(part) / len(part) for part in parts]


def _spans_decades(values: Sequence[float]) -> bool:
    return len(values) > 2 and min(values) > 0 and max(values) / min(values) > 100


def _inline(svg: str, text: str, salt: str) -> str:
    """Keep the drawing only; let the page give colors, font and size; describe the image in words."""
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
