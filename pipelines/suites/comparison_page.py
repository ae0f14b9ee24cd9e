"""Systems side by side: one table and one plot, as a page that holds all it needs."""

from collections.abc import Sequence

from markupsafe import Markup
from pydantic import Field

from components.configuration.config import Config
from components.evaluation.measure import DistanceRow
from components.evaluation.plots import Panel, Series, plot_svg
from components.evaluation.report import Figure, Table, duration, figure, number, page_environment, shrunk

COLUMNS = (
    "system",
    "density",
    "bits/dim",
    "distance",
    "N",
    "precision",
    "recall",
    "trained",
    "s/image",
    "parameters",
    "seed",
)

WIDEST = 560  # pixels of a grid of samples


class SystemResult(Config):
    """What there is of a system by now."""

    recipe: str
    title: str
    branch: str  # of the taxonomy
    seed: int
    bits: float | None = None  # bits/dim of held-out images
    bits_error: float | None = None  # standard error over images
    likelihood: str = ""  # what the bits are: exact, a bound, an estimated bound
    made: DistanceRow | None = None  # what was measured of its samples
    samples: bytes = b""  # a grid of some of them, PNG
    train_seconds: float | None = None  # of all its trainings
    seconds_per_image: float | None = None
    parameters: int | None = None  # of all networks that sample
    missing: tuple[str, ...] = ()  # stages that are not finished
    obstacle: str = ""  # why it can't be run here
    command: str = ""  # that makes what is missing


class Comparison(Config):
    """All systems, and what tells how to read their distances."""

    systems: tuple[SystemResult, ...]
    feature_network: str = ""
    scale: tuple[DistanceRow, ...] = Field(default=())  # held-out images, measured as the samples are
    png_bits: float | None = None  # bits/dim of the same held-out images as PNGs

    @property
    def finished(self) -> list[SystemResult]:
        return [system for system in self.systems if not system.missing]


def comparison_table(comparison: Comparison) -> Table:
    """A row for each finished system and each seed, then the scale; ± is a standard error."""
    rows = [system_cells(system) for system in comparison.finished]
    rows += [(row.name, "–", "–", *distance_cells(row), "–", "–", "–", "–") for row in comparison.scale]
    if comparison.png_bits is not None:
        rows.append(("held-out images as PNG", "–", f"{comparison.png_bits:.2f}", *["–"] * 8))
    return Table(columns=COLUMNS, rows=tuple(rows))


def system_cells(system: SystemResult) -> tuple[str, ...]:
    """A row of the table, a cell for each of COLUMNS."""
    bits = (
        "–" if system.bits is None else f"{with_error(system.bits, system.bits_error, digits=2)}, {system.likelihood}"
    )
    made = distance_cells(system.made) if system.made is not None else ("–",) * 4
    parameters = "–" if system.parameters is None else f"{system.parameters / 1e6:.2f} M"
    seconds = number(system.seconds_per_image)
    return (
        system.title,
        system.branch,
        bits,
        *made,
        duration(system.train_seconds),
        seconds,
        parameters,
        str(system.seed),
    )


def distance_cells(row: DistanceRow) -> tuple[str, str, str, str]:
    """Distance, N, precision, recall."""
    shares = (
        "–" if share is None else with_error(share, share_error(share, row.samples), digits=2)
        for share in (row.precision, row.recall)
    )
    distance = with_error(row.distance, row.standard_error, digits=1)
    return (distance, f"{row.samples:,}", *shares)  # pyrefly: ignore[bad-return]


def share_error(share: float, count: int) -> float:
    """Standard error of a share of so many independent images: the root of p (1 - p) / N."""
    return (share * (1 - share) / count) ** 0.5


def with_error(value: float, error: float | None, *, digits: int) -> str:
    shown = f"{value:.{digits}f}"
    return shown if error is None else f"{shown} ± {error:.{digits}f}"


def draw_comparison(comparison: Comparison) -> str:
    """Distance against the seconds of one sample, as SVG: a point for each seed; empty without any."""
    found: dict[str, list[tuple[float, float, float]]] = {}
    for system in comparison.finished:
        if system.made is not None and system.seconds_per_image:
            point = (system.seconds_per_image, system.made.distance, system.made.standard_error or 0.0)
            found.setdefault(system.title, []).append(point)
    if not found:
        return ""
    series = [Series(title, *zip(*points, strict=True)) for title, points in found.items()]
    levels = {f"{row.name}, N {row.samples}": row.distance for row in comparison.scale}
    label = f"Fréchet distance ({comparison.feature_network})"
    return plot_svg([Panel("seconds for an image", label, series, levels=levels, log_x=True)], salt="comparison")


def sample_figures(comparison: Comparison) -> list[Figure]:
    """The samples of each finished system, those of other seeds too."""
    found = []
    for system in comparison.finished:
        title = f"{system.title}, seed {system.seed}" if system.seed else system.title
        if system.samples:
            small = shrunk(system.samples, width=WIDEST)
            found.append(figure(f"{system.recipe}-{system.seed}", small, title, f"Samples of {title}"))
    return found


def render_comparison(comparison: Comparison) -> str:
    """The page as HTML without script."""
    page = page_environment(__name__).get_template("comparison.html.j2")
    missing: Sequence[SystemResult] = [system for system in comparison.systems if system.missing]
    drawn = Markup(draw_comparison(comparison))
    return page.render(
        comparison=comparison,
        table=comparison_table(comparison),
        plot=drawn,
        samples=sample_figures(comparison),
        missing=missing,
    )
