"""The lecture's taxonomy, measured: all systems on the same images and minutes: `cascade compare`."""

import json
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from markupsafe import Markup
from pydantic import Field
from rich.console import Console

from components.configuration.usage import UsageError, nearest
from components.data.listing import SourceError
from components.evaluation.image_sets import HELD_OUT
from components.evaluation.likelihood_study import LOSSLESS
from components.evaluation.metrics import METRICS, USUAL, DistanceRow
from components.evaluation.plots import Panel, Series, plot_svg
from components.evaluation.report import Figure, Table, duration, figure, number, page_environment, shrunk
from pipelines.engine.display import say
from pipelines.engine.run_report import run_images
from pipelines.recipes.rows import SIDE, TAXONOMY, TRACTABLE
from pipelines.suites.runner import Key, Result, Stages, Suite, shown_table

SEEDS = "compare.json"
SYSTEMS = {system.name: system for system in TAXONOMY}
LIKELIHOODS = {  # names in the study's summary -> what they are; an exact one is only that of a tractable density
    "held_out_bits_per_dim": "bound",
    "estimated_held_out_bits_per_dim": "estimated bound",
}
FIGURES = [name for name in USUAL if name != "distance"]  # beside the distance
COLUMNS = ("system", "density", "bits/dim", "distance", "N", *FIGURES, "trained", "s/image", "parameters", "seed")
UNKNOWN = "–"
WIDEST = 560  # pixels of a grid of samples


class SystemResult(Result):
    """State and figures of one system of the comparison, trained with one seed."""

    title: str = ""
    branch: str = ""  # of the taxonomy
    bits: float | None = None  # bits/dim of held-out images
    bits_error: float | None = None  # standard error over images
    likelihood: str = ""  # what the bits are: exact, a bound, an estimated bound
    made: DistanceRow | None = None  # what was measured of its samples
    samples: bytes = b""  # a grid of some of them, PNG
    seconds_per_image: float | None = None
    parameters: int | None = None  # of all networks that sample
    feature_network: str = ""  # of its distances
    scale: DistanceRow | None = None  # held-out images, measured as its samples are
    lossless: dict[str, float] = Field(default_factory=dict)  # bits/dim of the same held-out images without a model
    command: str = ""  # that makes what is missing


def run_compare(
    names: list[str],
    *,
    seed: int,
    storage: str | None,
    tracking: str | None,
    profile: str,
    console: Console,
    figures: Path | None = None,
) -> int:
    """Run the unfinished recipes of systems in turn. Returns 1 if a recipe failed, 130 if interrupted.

    A finished recipe runs too if MLflow does not know its run: its stages are cached, and its results are sent again.
    `compare.html` in storage is written before the first and after each, with the rows of all seeds asked for so far.
    `names`: systems, such as gan or gan_32; empty: all. `seed`: of trainings and samples. `figures`: JSON file that
    gets the figures of all finished systems in the storage, when the page is written. Raises UsageError for a name that
    is none, SourceError where the images are not on this machine."""
    chosen = [(recipe, seed) for recipe in chosen_systems(names)]
    comparison = Comparison(storage, tracking=tracking, profile=profile, figures=figures)
    comparison.add_seed(seed)
    comparison.write()
    for key in chosen:
        if obstacle := comparison.results[key].obstacle:
            raise SourceError(obstacle)
    titles = {key: f"{SYSTEMS[key[0]].title}{f', seed {seed}' if seed else ''}" for key in chosen}
    code = comparison.run(titles, noun="systems", console=console)
    console.print(shown_table(comparison_table(comparison.ordered()), title="The taxonomy, measured"))
    for result in (comparison.results[key] for key in chosen):
        if result.missing:
            say(console, f"not finished: {result.title}: {', '.join(result.missing)}; {result.command}")
    say(console, f"page: {comparison.root.url(comparison.page)}")
    return code


def chosen_systems(names: list[str]) -> list[str]:
    """Recipes of systems by name, with or without the size, in the order of the taxonomy."""
    suffix = f"_{SIDE}"
    recipes = {name if name.endswith(suffix) else f"{name}{suffix}": name for name in names}
    for recipe, name in recipes.items():
        if recipe not in SYSTEMS:
            raise UsageError(f"no system {name!r}{nearest(name, [system.removesuffix(suffix) for system in SYSTEMS])}")
    return [recipe for recipe in SYSTEMS if not names or recipe in recipes]


class Comparison(Suite[SystemResult]):
    """All systems with all seeds asked for in a storage."""

    name, page = "compare", "compare.html"
    unsaved = frozenset({"title", "branch", "samples", "command"})

    @property
    def seeds(self) -> list[int]:
        return json.loads(self.root.read(SEEDS)) if self.root.exists(SEEDS) else []

    def add_seed(self, seed: int) -> None:
        """Show rows of a seed from now on, next to rows of seed 0."""
        self.root.write(SEEDS, json.dumps(sorted({0, seed, *self.seeds})).encode())

    def keys(self) -> list[Key]:
        return [(recipe, seed) for seed in self.seeds for recipe in SYSTEMS]

    def result(self, key: Key, stages: Stages) -> SystemResult:
        """Figures and samples in the finished stages of a system."""
        recipe, seed = key
        system, metadata = SYSTEMS[recipe], {name: artifact.metadata for name, artifact in stages.artifacts.items()}
        likelihood, samples = (metadata.get(name, {}).get("summary", {}) for name in ("likelihood", "samples"))
        name = next((name for name in LIKELIHOODS if name in likelihood), "")
        exact, evaluation = system.branch == TRACTABLE, metadata.get("evaluation", {})
        distances = [DistanceRow(**row) for row in evaluation.get("distances", [])]
        made = [row for row in distances if row.purpose == "model" and "samples" in metadata]
        images = run_images(stages.artifacts) if not stages.missing else {}
        return SystemResult(
            recipe=recipe,
            title=system.title,
            branch=system.branch,
            seed=seed,
            bits=likelihood.get(name),
            bits_error=likelihood.get(f"{name}_standard_error"),
            likelihood="exact" if name and exact else LIKELIHOODS.get(name, ""),
            made=made[-1] if made else None,  # the last is the finished image
            samples=next((png for name, png in images.items() if name.endswith("_unconditional")), b""),
            train_seconds=stages.train_seconds,
            seconds_per_image=next(iter(samples.values()), None),
            parameters=sum(int(each.metadata["summary"]["parameters"]) for each in stages.trained.values()) or None,
            feature_network=evaluation.get("feature_network", ""),
            scale=next((row for row in distances if row.name == HELD_OUT), None),
            lossless={name: likelihood[metric] for name, metric in LOSSLESS.items() if metric in likelihood},
            missing=stages.missing,
            command=f"cascade compare {recipe}{f' --seed {seed}' if seed else ''}",
        )

    def ordered(self) -> list[SystemResult]:
        """Results of all systems with seed 0, each followed by finished results of other seeds."""
        results = [self.results[recipe, seed] for recipe in SYSTEMS for seed in self.seeds]
        return [result for result in results if result.seed == 0 or not result.missing]

    def render(self) -> str:
        return render_comparison(self.ordered())


def comparison_table(systems: Iterable[SystemResult]) -> Table:
    """A row for each finished system and seed, held-out images, their lossless files; ± is standard error."""
    systems = list(systems)
    rows = [system_cells(system) for system in systems if not system.missing]
    for row in [system.scale for system in systems if system.scale is not None][:1]:
        rows.append((row.name, UNKNOWN, UNKNOWN, *distance_cells(row), *[UNKNOWN] * 4))
    for name, bits in next((system.lossless for system in systems if system.lossless), {}).items():
        rows.append((f"held-out images, {name}", UNKNOWN, f"{bits:.2f}", *[UNKNOWN] * (len(COLUMNS) - 3)))
    return Table(columns=COLUMNS, rows=tuple(rows))


def system_cells(system: SystemResult) -> tuple[str, ...]:
    """A row of the table, a cell for each of COLUMNS."""
    bits = with_error(system.bits, system.bits_error, digits=2)
    bits += f", {system.likelihood}" if system.bits is not None else ""
    made = distance_cells(system.made) if system.made is not None else (UNKNOWN,) * (2 + len(FIGURES))
    parameters = UNKNOWN if system.parameters is None else f"{system.parameters / 1e6:.2f} M"
    took = (duration(system.train_seconds), number(system.seconds_per_image))
    return (system.title, system.branch, bits, *made, *took, parameters, str(system.seed))


def distance_cells(row: DistanceRow) -> tuple[str, ...]:
    """Distance, N, and the other figures of METRICS, each with the standard error."""
    distance, *others = (
        with_error(row.figure(name), row.error(name), digits=METRICS[name].digits) for name in ("distance", *FIGURES)
    )
    return (distance, f"{row.samples:,}", *others)


def with_error(value: float | None, error: float | None, *, digits: int) -> str:
    """A figure with its standard error; a dash if it was not measured."""
    if value is None:
        return UNKNOWN
    return f"{value:.{digits}f}" if error is None else f"{value:.{digits}f} ± {error:.{digits}f}"


def draw_comparison(systems: Sequence[SystemResult]) -> str:
    """Distance against the seconds of a sample, as SVG: a point for each seed; empty without points."""
    points: dict[str, list[tuple[float, float, float]]] = {}
    for system in systems:
        if not system.missing and (made := system.made) is not None and system.seconds_per_image:
            point = (system.seconds_per_image, made.distance, made.standard_error or 0.0)
            points.setdefault(system.title, []).append(point)
    if not points:
        return ""
    series = [Series(title, *zip(*each, strict=True)) for title, each in points.items()]
    scales = (system.scale for system in systems if system.scale is not None)
    levels = {f"{scale.name}, N {scale.samples}": scale.distance for scale in islice(scales, 1)}
    label = f"Fréchet distance ({feature_network(systems)})"
    return plot_svg([Panel("seconds for an image", label, series, levels=levels, log_x=True)], salt="comparison")


def feature_network(systems: Iterable[SystemResult]) -> str:
    return next((system.feature_network for system in systems if system.feature_network), "")


def sample_figures(systems: Iterable[SystemResult]) -> list[Figure]:
    """Samples of each finished system and seed."""
    figures = []
    for system in systems:
        title = f"{system.title}, seed {system.seed}" if system.seed else system.title
        if system.samples and not system.missing:
            small = shrunk(system.samples, width=WIDEST)
            figures.append(figure(f"{system.recipe}-{system.seed}", small, title, f"Samples of {title}"))
    return figures


def render_comparison(systems: Sequence[SystemResult]) -> str:
    """The page as HTML without script."""
    return page_environment(__name__).get_template("comparison.html.j2").render(measured=measured(systems))


def measured(systems: Sequence[SystemResult]) -> dict[str, Any]:
    """Table, plot and samples of the systems, for `measured.html.j2` on any page."""
    return {
        "systems": systems,
        "feature_network": feature_network(systems),
        "table": comparison_table(systems),
        "plot": Markup(draw_comparison(systems)),
        "samples": sample_figures(systems),
    }
