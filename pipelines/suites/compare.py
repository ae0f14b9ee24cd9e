"""The lecture's taxonomy, measured on the same images over budgets of training: `cascade compare`."""

import json
from collections.abc import Iterable, Sequence
from operator import attrgetter
from typing import Any

from markupsafe import Markup
from pydantic import Field
from rich.console import Console

from components.configuration.usage import UsageError, nearest
from components.data.listing import SourceError
from components.evaluation.curves import Curve, averaged_curves, crossing, draw_curves
from components.evaluation.image_sets import HELD_OUT
from components.evaluation.likelihood_study import LOSSLESS
from components.evaluation.metrics import METRICS, USUAL, DistanceRow
from components.evaluation.report import Figure, Table, duration, figure, number, page_environment, shrunk
from pipelines.engine.display import say
from pipelines.engine.run_report import run_images
from pipelines.recipes.rows import BUDGETS, LONGEST, SIDE, TAXONOMY, TRACTABLE
from pipelines.suites.runner import Key, Result, Stages, Suite, shown_table

SEEDS = "compare.json"
SYSTEMS = {system.name: system for system in TAXONOMY}
LIKELIHOODS = {  # names in the study's summary -> what they are
    "held_out_bits_per_dim": "bound",
    "estimated_held_out_bits_per_dim": "estimated bound",
}
FIGURES = [name for name in USUAL if name != "distance"]  # beside the distance
COLUMNS = (
    *("system", "minutes", "density", "bits/dim", "distance", "N"),
    *FIGURES,
    *("trained", "s/image", "parameters", "seed"),
)
UNKNOWN = "–"
WIDEST = 560  # pixels of a grid of samples
SETS = {"": "OpenMoji", "scenes": "scenes"}  # source in place of the recipes' -> its name
RIVAL, DIFFUSION = "gan_32", ("ddpm_32", "today_32", "latent_diffusion_32")  # of whom a crossing is told
BITS, SECONDS = "bits/dim", "seconds for an image"


class SystemResult(Result):
    """State and figures of one system of the comparison, trained for one budget with one seed."""

    minutes: int = 0  # budget of all trainings, of one core; 0: without one
    source: str = ""  # set of images; empty: the recipe's
    title: str = Field("", exclude=True)
    branch: str = Field("", exclude=True)  # of the taxonomy
    cpu_seconds: float | None = None  # of the processor, of all its trainings
    bits: float | None = None  # bits/dim of held-out images
    bits_error: float | None = None  # standard error over images
    likelihood: str = ""  # what the bits are: exact, a bound, an estimated bound
    made: DistanceRow | None = None  # what was measured of its samples
    samples: bytes = Field(b"", exclude=True)  # a grid of some of them, PNG
    seconds_per_image: float | None = None
    parameters: int | None = None  # of all networks that sample
    feature_network: str = ""  # of its distances
    scale: DistanceRow | None = None  # held-out images, measured as its samples are
    lossless: dict[str, float] = Field({})  # bits/dim without a model
    command: str = Field("", exclude=True)  # that makes what is missing

    def measured(self, figure: str) -> tuple[float | None, float | None]:
        """A figure with the standard error, each None where not measured."""
        own = {BITS: (self.bits, self.bits_error), SECONDS: (self.seconds_per_image, None)}
        of_images = {name: (self.made.figure(name), self.made.error(name)) for name in USUAL} if self.made else {}
        return (own | of_images).get(figure, (None, None))


def run_compare(
    comparison: "Comparison", names: list[str], console: Console, *, seed: int, minutes: Sequence[int] = ()
) -> int:
    """Run the unfinished recipes of systems in turn. Returns 1 if a recipe failed, 130 if interrupted.

    A finished recipe runs too if MLflow does not know its run: its stages are cached, and its results are sent again.
    Small budgets are first. `compare.html` in storage is written before the first and after each, with the rows of all
    seeds asked for so far. `names`: systems, such as gan or gan_32; empty: all. `seed`: of trainings and samples.
    `minutes`: budgets; empty: all. Raises UsageError for a name that is none or a budget that no system named has,
    SourceError where the images are not on this machine."""
    keys = [key for recipe in chosen_systems(names) for key in budgets(recipe, seed)]
    if unknown := {*minutes} - {key.minutes for key in keys}:
        known = ", ".join(map(str, sorted({key.minutes for key in keys})))
        raise UsageError(f"--minutes {min(unknown)}: these systems have budgets of {known} minutes")
    chosen = [key for key in keys if not minutes or key.minutes in minutes]
    comparison.add_seed(seed)
    comparison.write()
    for key in chosen:
        if obstacle := comparison.results[key].obstacle:
            raise SourceError(obstacle)
    titles = {key: described(key) for key in sorted(chosen, key=attrgetter("minutes"))}
    code = comparison.run(titles, noun="systems", console=console)
    page = measured(comparison.ordered())
    tables = [shown_table(own, title=f"The taxonomy, measured on {name}") for name, own in page["tables"].items()]
    console.print(*tables, *page["crossings"], sep="\n")
    for key, result in ((key, comparison.results[key]) for key in titles):
        if result.missing:
            say(console, f"not finished: {described(key)}: {', '.join(result.missing)}; {result.command}")
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


def budgets(recipe: str, seed: int) -> list[Key]:
    """Keys of a system: BUDGETS, and of a principal system LONGEST and scenes."""
    more = ((LONGEST, ""), *((BUDGETS[-1], source) for source in SETS if source)) if SYSTEMS[recipe].principal else ()
    return [Key(recipe, seed, *budget) for budget in (*((minutes, "") for minutes in BUDGETS), *more)]


def described(key: Key | SystemResult) -> str:
    """System, budget, and an unusual set or seed, in words."""
    told = (f"{key.minutes} minutes" * bool(key.minutes), key.source, f"seed {key.seed}" * bool(key.seed))
    return ", ".join([SYSTEMS[key.recipe].title, *filter(None, told)])


class Comparison(Suite[SystemResult]):
    """All systems at all budgets with all seeds asked for in a storage."""

    name, page = "compare", "compare.html"

    @property
    def seeds(self) -> list[int]:
        return json.loads(self.root.read(SEEDS)) if self.root.exists(SEEDS) else []

    def add_seed(self, seed: int) -> None:
        """Show rows of a seed from now on, next to rows of seed 0."""
        self.root.write(SEEDS, json.dumps(sorted({0, seed, *self.seeds})).encode())

    def keys(self) -> list[Key]:
        return [key for recipe in SYSTEMS for seed in self.seeds for key in budgets(recipe, seed)]

    def result(self, key: Key, stages: Stages) -> SystemResult:
        """Figures and samples in the finished stages of a system."""
        system, metadata = SYSTEMS[key.recipe], {name: artifact.metadata for name, artifact in stages.artifacts.items()}
        likelihood, samples = (metadata.get(name, {}).get("summary", {}) for name in ("likelihood", "samples"))
        name = next((name for name in LIKELIHOODS if name in likelihood), "")
        exact, evaluation = system.branch == TRACTABLE, metadata.get("evaluation", {})
        distances = [DistanceRow(**row) for row in evaluation.get("distances", [])]
        made = [row for row in distances if row.purpose == "model" and "samples" in metadata]
        images = run_images(stages.artifacts) if not stages.missing else {}
        return SystemResult(
            **key._asdict(),
            title=system.title,
            branch=system.branch,
            bits=likelihood.get(name),
            bits_error=likelihood.get(f"{name}_standard_error"),
            likelihood="exact" if name and exact else LIKELIHOODS.get(name, ""),
            made=made[-1] if made else None,  # the last is the finished image
            samples=next((png for name, png in images.items() if name.endswith("_unconditional")), b""),
            train_seconds=stages.summed("train_seconds"),
            cpu_seconds=stages.summed("cpu_seconds"),
            seconds_per_image=next(iter(samples.values()), None),
            parameters=sum(int(each.metadata["summary"]["parameters"]) for each in stages.trained.values()) or None,
            feature_network=evaluation.get("feature_network", ""),
            scale=next((row for row in distances if row.name == HELD_OUT), None),
            lossless={name: likelihood[metric] for name, metric in LOSSLESS.items() if metric in likelihood},
            missing=stages.missing,
            command=f"cascade compare {key.recipe} --minutes {key.minutes}{f' --seed {key.seed}' if key.seed else ''}",
        )

    def ordered(self) -> list[SystemResult]:
        """Results of all systems with seed 0, and finished results of other seeds."""
        results = [self.results[key] for key in self.keys()]
        return [result for result in results if result.seed == 0 or not result.missing]

    def render(self) -> str:
        return render_comparison(self.ordered())


def comparison_table(systems: Sequence[SystemResult]) -> Table:
    """A row for each finished system and seed, held-out images, their lossless files; ± is standard error."""
    rows = [system_cells(system) for system in systems if not system.missing]
    for row in [system.scale for system in systems if system.scale is not None][:1]:
        rows.append((row.name, UNKNOWN, UNKNOWN, UNKNOWN, *distance_cells(row), *[UNKNOWN] * 4))
    for name, bits in next((system.lossless for system in systems if system.lossless), {}).items():
        rows.append((f"held-out images, {name}", UNKNOWN, UNKNOWN, f"{bits:.2f}", *[UNKNOWN] * (len(COLUMNS) - 4)))
    return Table(columns=COLUMNS, rows=tuple(rows))


def system_cells(system: SystemResult) -> tuple[str, ...]:
    """A row of the table, a cell for each of COLUMNS."""
    bits = with_error(system.bits, system.bits_error, digits=2)
    bits += f", {system.likelihood}" if system.bits is not None else ""
    made = distance_cells(system.made) if system.made is not None else (UNKNOWN,) * (2 + len(FIGURES))
    parameters = UNKNOWN if system.parameters is None else f"{system.parameters / 1e6:.2f} M"
    took = (duration(system.cpu_seconds or system.train_seconds), number(system.seconds_per_image))
    named = (system.title, str(system.minutes or UNKNOWN), system.branch, bits)
    return (*named, *made, *took, parameters, str(system.seed))


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


def curves_of(systems: Iterable[SystemResult], name: str) -> dict[str, Curve]:
    """System -> curve of a figure over budgets on OpenMoji; results of several seeds are averaged."""
    own = [system for system in systems if system.minutes and not (system.missing or system.source)]
    return averaged_curves((system.title, system.minutes, *system.measured(name)) for system in own)


def crossings(systems: Iterable[SystemResult]) -> list[str]:
    """Sentences about each of DIFFUSION against the GAN, over the budgets of both."""
    distances, rival = curves_of(systems, "distance"), SYSTEMS[RIVAL].title
    curves = {SYSTEMS[recipe].title: distances.get(SYSTEMS[recipe].title, []) for recipe in DIFFUSION}
    return [*filter(None, (crossing(own, curve, rival, distances.get(rival, [])) for own, curve in curves.items()))]


def draw_comparison(systems: Sequence[SystemResult]) -> str:
    """Figures over minutes, and distance over seconds of an image, as SVG; empty without points."""
    curves = {name: curves_of(systems, name) for name in (*USUAL, BITS, SECONDS)}
    scales = [scale for own in systems if (scale := own.scale) is not None and not own.source][:1]
    levels = {f"{scale.name}, N {scale.samples}": scale.distance for scale in scales}
    return draw_curves(curves, levels=levels, against=("distance", SECONDS))


def sample_figures(systems: Iterable[SystemResult]) -> list[Figure]:
    """Samples of each finished system, set and seed at the largest budget."""
    longest = {(system.recipe, system.seed, system.source): system for system in systems if system.samples}
    return [
        figure(
            "-".join(map(str, key)), shrunk(own.samples, width=WIDEST), described(own), f"Samples of {described(own)}"
        )
        for key, own in longest.items()
    ]


def render_comparison(systems: Sequence[SystemResult]) -> str:
    """The page as HTML without script."""
    return page_environment(__name__).get_template("comparison.html.j2").render(measured=measured(systems))


def measured(systems: Sequence[SystemResult]) -> dict[str, Any]:
    """Tables, plots, crossings and samples of the systems, for `measured.html.j2` on any page."""
    return {
        "systems": systems,
        "feature_network": next((system.feature_network for system in systems if system.feature_network), ""),
        "tables": {
            name: table
            for source, name in SETS.items()
            if (table := comparison_table([own for own in systems if own.source == source])).rows
        },
        "crossings": crossings(systems),
        "plot": Markup(draw_comparison(systems)),
        "samples": sample_figures(systems),
    }
