"""The lecture's taxonomy, measured: all systems on the same images and minutes, one table: `cascade compare`."""

import json

from rich.console import Console
from rich.table import Table

from components.configuration.optimization import Training
from components.configuration.usage import UsageError, nearest
from components.data.errors import SourceError
from components.evaluation.measure import HELD_OUT, DistanceRow
from components.runtime.storage.artifact import Artifact
from components.runtime.storage.store import Store
from pipelines.engine import driver
from pipelines.engine.run_report import run_images
from pipelines.planning.profiles import storage_uri
from pipelines.recipes.catalog import RECIPES
from pipelines.recipes.shapes import Recipe
from pipelines.recipes.taxonomy import SIDE, TAXONOMY, TRACTABLE, System
from pipelines.suites.comparison_page import Comparison, SystemResult, comparison_table, render_comparison
from pipelines.suites.in_turn import Finished, finished_stages, left_to_run, run_in_turn

PAGE, SEEDS = "compare.html", "compare.json"
SYSTEMS: dict[str, System] = {recipe.__name__: system for recipe, system in TAXONOMY.items()}
LIKELIHOODS = {  # names in the study's summary -> what they are; an exact one is only that of a tractable density
    "held_out_bits_per_dim": "bound",
    "estimated_held_out_bits_per_dim": "estimated bound",
}


def run_compare(
    names: list[str], *, seed: int, storage: str | None, tracking: str | None, profile: str, console: Console
) -> int:
    """Run the recipes of systems that are not finished, in turn. Returns 1 if one failed, 130 if interrupted. One that
    is finished and that MLflow does not know runs too: it is sent again, and trains nothing.

    `compare.html` in storage is written before the first and after each, with the rows of all seeds asked for so far.

    Args:
        names: systems, such as gan or gan_32; empty: all.
        seed: of trainings and samples.

    Raises UsageError for a name that is none, SourceError where the images are not on this machine.
    """
    chosen = chosen_systems(names)
    page = ComparisonPage(Store(storage_uri(storage)), tracking, profile)
    page.add_seed(seed)
    page.write()
    for recipe in chosen:
        if obstacle := page.results[recipe, seed].obstacle:
            raise SourceError(obstacle)
    finished = {recipe: page.runs[recipe, seed] for recipe in chosen if not page.results[recipe, seed].missing}
    left = left_to_run(chosen, finished, tracking=tracking, what="systems", console=console)
    titles = {recipe: f"{SYSTEMS[recipe].title}{f', seed {seed}' if seed else ''}" for recipe in left}
    code = run_in_turn(titles, lambda recipe: page.options(recipe, seed), after=page.write, console=console)
    console.print(shown_table(page.comparison()))
    for result in (page.results[recipe, seed] for recipe in left):
        if result.missing:
            missing = ", ".join(result.missing)
            console.print(f"not finished: {result.title}: {missing}; {result.command}", highlight=False, soft_wrap=True)
    console.print(f"page: {page.root.url(PAGE)}", highlight=False, soft_wrap=True)
    return code


def chosen_systems(names: list[str]) -> list[str]:
    """Recipes of the systems named, with or without their size, in the order of the taxonomy."""
    suffix = f"_{SIDE}"
    wanted = {name if name.endswith(suffix) else f"{name}{suffix}": name for name in names}
    for recipe, name in wanted.items():
        if recipe not in SYSTEMS:
            raise UsageError(f"no system {name!r}{nearest(name, [known.removesuffix(suffix) for known in SYSTEMS])}")
    return [recipe for recipe in SYSTEMS if not names or recipe in wanted]


class ComparisonPage:
    """The page in a storage. What is finished is read once."""

    def __init__(self, root: Store, tracking: str | None, profile: str) -> None:
        self.root, self.tracking, self.profile = root, tracking, profile
        self.results: dict[tuple[str, int], SystemResult] = {}  # by recipe and seed
        self.runs: dict[tuple[str, int], str] = {}
        self.scale: dict[str, Artifact] = {}  # the evaluation and the likelihood that were found first

    @property
    def seeds(self) -> list[int]:
        return json.loads(self.root.read(SEEDS)) if self.root.exists(SEEDS) else []

    def add_seed(self, seed: int) -> None:
        """Rows of this seed are shown from now on, next to those of seed 0."""
        self.root.write(SEEDS, json.dumps(sorted({0, seed, *self.seeds})).encode())

    def options(self, recipe: str, seed: int) -> driver.RunOptions:
        """A seed other than 0 has models of its own name, so that the champion stays that of seed 0."""
        return driver.RunOptions(
            recipe=recipe,
            set=seed_assignments(RECIPES[recipe](), seed) if seed else [],
            name=f"{recipe}_seed_{seed}" if seed else None,
            storage=self.root.uri,
            tracking=self.tracking,
            profile=self.profile,
        )

    def write(self) -> None:
        for seed in self.seeds:
            for recipe in SYSTEMS:
                known = self.results.get((recipe, seed))
                if known is None or known.missing:
                    self.results[recipe, seed] = self.collect(recipe, seed)
        self.root.write(PAGE, render_comparison(self.comparison()).encode())

    def collect(self, recipe: str, seed: int) -> SystemResult:
        """What there is of a system, or why it can't be run here."""
        try:
            prepared = driver.prepare(self.options(recipe, seed))
        except SourceError as error:
            return system_result(recipe, seed, Finished({}, {}, ("images",)), obstacle=str(error))
        self.runs[recipe, seed], found = prepared.run, finished_stages(prepared)
        for name in {"evaluation", "likelihood"} & found.artifacts.keys():
            self.scale.setdefault(name, found.artifacts[name])
        return system_result(recipe, seed, found)

    def comparison(self) -> Comparison:
        """All systems, each followed by what is finished of it with other seeds."""
        ordered = [self.results[recipe, seed] for recipe in SYSTEMS for seed in self.seeds]
        evaluation = self.scale["evaluation"].metadata if "evaluation" in self.scale else {}
        likelihood = self.scale["likelihood"].metadata["summary"] if "likelihood" in self.scale else {}
        scale = [DistanceRow(**row) for row in evaluation.get("distances", []) if row["name"] == HELD_OUT]
        return Comparison(
            systems=tuple(result for result in ordered if result.seed == 0 or not result.missing),
            feature_network=evaluation.get("feature_network", ""),
            scale=tuple(scale),
            png_bits=likelihood.get("png_bits_per_dim"),
        )


def seed_assignments(recipe: Recipe, seed: int) -> list[str]:
    """`--set` assignments of another seed for all trainings and samples of a recipe; data and measures keep theirs."""
    parts = {name: getattr(recipe, name) for name in type(recipe).model_fields}
    for name, value in [*parts.items()]:
        if isinstance(value, tuple):
            parts |= {f"{name}.{number}": each for number, each in enumerate(value)}
    trained = [name for name, value in parts.items() if isinstance(value, Training)]
    return [*(f"{name}.optimization.seed={seed}" for name in trained), f"samples.seed={seed}"]


def system_result(recipe: str, seed: int, found: Finished, *, obstacle: str = "") -> SystemResult:
    """What the finished stages of a system state."""
    system, metadata = SYSTEMS[recipe], {name: artifact.metadata for name, artifact in found.artifacts.items()}
    likelihood = metadata.get("likelihood", {}).get("summary", {})
    name = next((name for name in LIKELIHOODS if name in likelihood), "")
    exact = system.branch == TRACTABLE
    made = [row for row in metadata.get("evaluation", {}).get("distances", []) if row["purpose"] == "model"]
    images = run_images(found.artifacts) if not found.missing else {}
    seconds = [*metadata.get("samples", {}).get("summary", {}).values()]
    return SystemResult(
        recipe=recipe,
        title=system.title,
        branch=system.branch,
        seed=seed,
        bits=likelihood.get(name),
        bits_error=likelihood.get(f"{name}_standard_error"),
        likelihood="exact" if name and exact else LIKELIHOODS.get(name, ""),
        made=DistanceRow(**made[-1]) if made and "samples" in metadata else None,  # the last is the finished image
        samples=next((png for name, png in images.items() if name.endswith("_unconditional")), b""),
        train_seconds=found.train_seconds,
        seconds_per_image=seconds[0] if seconds else None,
        parameters=sum(int(each.metadata["summary"]["parameters"]) for each in found.trained.values()) or None,
        missing=found.missing,
        obstacle=obstacle,
        command=f"cascade compare {recipe}{f' --seed {seed}' if seed else ''}",
    )


def shown_table(comparison: Comparison) -> Table:
    table = comparison_table(comparison)
    shown = Table(*table.columns, title="The taxonomy, measured", title_justify="left")
    for row in table.rows:
        shown.add_row(*map(str, row))
    return shown
