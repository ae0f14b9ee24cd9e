"""The lecture, run: every system by its own recipe, and a page of all slides: `cascade lecture`, `make lecture`."""

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from rich.console import Console
from rich.table import Table

from components.configuration.usage import UsageError, nearest
from components.data.errors import SourceError
from components.evaluation.grids import readable
from components.evaluation.report import shrunk, stage_curves
from components.runtime.storage.artifact import Artifact
from components.runtime.storage.store import Store
from pipelines.engine import driver
from pipelines.engine.display import duration
from pipelines.engine.run_report import run_images, run_words, stage_curve, study_of
from pipelines.planning.profiles import storage_uri
from pipelines.recipes.catalog import RECIPES, ROWS
from pipelines.suites.in_turn import finished_stages, left_to_run, run_in_turn
from pipelines.suites.lecture_page import RecipeResult, render_lecture
from pipelines.suites.slides import LECTURE, read_slides

HELD_OUT = "held_out_"
PAGE = "lecture.html"
WIDEST = 2400  # pixels of an image on the page; reports have them whole
SLIDES = read_slides(LECTURE.read_text())


def run_lecture(names: list[str], *, storage: str | None, tracking: str | None, profile: str, console: Console) -> int:
    """Run the recipes of the rows that are not finished, in turn. Returns 1 if one failed, 130 if interrupted. One that
    is finished and that MLflow does not know runs too: it is sent again, and trains nothing.

    Rows whose images are not on this machine are left out, and said so. `lecture.html` in storage is written before the
    first recipe and after each: all slides, with what there is by then, and what is missing.

    Args:
        names: rows or recipes to run; empty: all.

    Raises UsageError for a name that is neither and without the extra `lecture`, SourceError for a row that is named
    but has no images here.
    """
    if find_spec("latex2mathml") is None:
        raise UsageError("the lecture's page needs the extra lecture: pip install 'image-cascade[lecture]'")
    chosen = chosen_rows(names)
    page = LecturePage(Store(storage_uri(storage)), tracking, profile)
    page.write()
    for recipe in [recipe for recipe in chosen if page.results[recipe].obstacle]:
        if names:
            raise SourceError(page.results[recipe].obstacle)
        obstacle = page.results[recipe].obstacle
        console.print(f"left out: {recipe}: {obstacle}", style="yellow", highlight=False, soft_wrap=True)
        del chosen[recipe]
    finished = {recipe: page.runs[recipe] for recipe in chosen if page.is_finished(recipe)}
    left = left_to_run(chosen, finished, tracking=tracking, what="recipes", console=console)
    titles = {recipe: f"row {chosen[recipe]}, {recipe}" for recipe in left}
    code = run_in_turn(
        titles, lambda recipe: options(recipe, storage, tracking, profile), after=page.write, console=console
    )
    if code != driver.INTERRUPTED:
        console.print(rows_table([page.results[recipe] for recipe in chosen if not page.results[recipe].missing]))
        console.print(f"page: {page.root.url(PAGE)}", highlight=False, soft_wrap=True)
    return code


class LecturePage:
    """The page in a storage. What a finished recipe has to show is read once."""

    def __init__(self, root: Store, tracking: str | None, profile: str) -> None:
        self.root, self.tracking, self.profile = root, tracking, profile
        self.results: dict[str, RecipeResult] = {}
        self.runs: dict[str, str] = {}  # recipe -> its run

    def write(self) -> None:
        for recipe in chosen_rows([]):
            if recipe not in self.results or self.results[recipe].missing:
                self.results[recipe] = self.collect(recipe)
        self.root.write(PAGE, render_lecture(SLIDES, self.results).encode())

    def is_finished(self, recipe: str) -> bool:
        """Whether nothing of it is to run: every stage is there, and the report."""
        result = self.results[recipe]
        return not result.missing and self.root.exists(result.report)

    def collect(self, recipe: str) -> RecipeResult:
        """What there is of a recipe, or why it can't be run here."""
        try:
            prepared = driver.prepare(options(recipe, self.root.uri, self.tracking, self.profile))
            self.runs[recipe] = prepared.run
            return collect_result(prepared)
        except SourceError as error:
            return RecipeResult(**named(recipe), missing=("images",), obstacle=str(error))


def options(recipe: str, storage: str | None, tracking: str | None, profile: str) -> driver.RunOptions:
    return driver.RunOptions(recipe=recipe, storage=storage, tracking=tracking, profile=profile)


def chosen_rows(names: list[str]) -> dict[str, str]:
    """Recipe -> row, of the rows or recipes named."""
    rows = {recipe.__name__: row for recipe, row in ROWS.items()}
    known = {*rows, *rows.values()}
    for name in names:
        if name not in known:
            raise UsageError(f"no row or recipe {name!r}{nearest(name, sorted(known))}")
    return {recipe: row for recipe, row in rows.items() if not names or recipe in names or row in names}


def named(recipe: str) -> dict[str, Any]:
    """By what a recipe is known."""
    first = (RECIPES[recipe].__doc__ or "").strip().splitlines()[0].partition(": ")[2]
    return {"recipe": recipe, "row": chosen_rows([])[recipe], "summary": first[:1].upper() + first[1:]}


def collect_result(prepared: driver.Prepared) -> RecipeResult:
    """What the finished stages of a recipe state of held-out images, made, and took; and which are not finished."""
    artifacts, trained, missing = found = finished_stages(prepared)
    studies = [study_of(artifact) for artifact in artifacts.values() if "plots" in artifact.metadata]
    return RecipeResult(
        **named(prepared.recipe.name),
        seconds=found.train_seconds,
        figures=figures_of(artifacts, trained),
        images={name: shrunk(png, width=WIDEST) for name, png in run_images(artifacts).items()},
        words=run_words(artifacts),
        plots={title: svg for study in studies for title, svg in study.plots.items()},
        tables={title: table for study in studies for title, table in study.tables.items()},
        curves={
            f"{readable(stage)}: {title}": svg
            for stage, artifact in trained.items()
            for title, svg in drawn_curves(prepared.root, artifact).items()
        },
        report="" if missing else f"runs/{prepared.run}/report.html",
        missing=missing,
    )


def figures_of(artifacts: Mapping[str, Artifact], trained: Mapping[str, Artifact]) -> dict[str, float]:
    """Likelihoods that models state, then what studies and the evaluation do."""
    figures = {
        name.removeprefix(HELD_OUT): value
        for artifact in trained.values()
        for name, value in artifact.metadata["summary"].items()
        if "bits_per" in name
    }
    for artifact in artifacts.values():
        figures |= stated_figures(artifact.metadata)
    return figures


def stated_figures(metadata: Mapping[str, Any]) -> dict[str, float]:
    """What an artifact states: a study its headline, an evaluation distances of what models made, and codes in use."""
    figures = dict(metadata.get("headline", {}))
    made = [found for found in metadata.get("distances", []) if found["purpose"] == "model"]
    figures |= {f"distance, {found['name']} (N {found['samples']})": found["distance"] for found in made}
    if use := metadata.get("held_out_codebook"):
        figures |= {"codes in use, %": 100 * use["codebook_usage"], "perplexity": use["codebook_perplexity"]}
    return figures


def drawn_curves(root: Store, artifact: Artifact) -> dict[str, str]:
    """The first curves of a training, the loss first: metric -> SVG."""
    points = stage_curve(root, artifact.stage, artifact.key)
    main = stage_curves(f"{artifact.stage}-{artifact.key[:6]}", points)["main"] if points else []
    return {entry["metric"].replace("_", " "): str(entry["svg"]) for entry in main[:3]}


def rows_table(finished: list[RecipeResult]) -> Table:
    table = Table("row", "recipe", "trained", "figures on held-out images", title="The rows", title_justify="left")
    for row in finished:
        figures = "\n".join(f"{name.replace('_', ' ')}: {value:.4g}" for name, value in row.figures.items())
        table.add_row(row.row, row.recipe, duration(row.seconds), figures)
    return table
