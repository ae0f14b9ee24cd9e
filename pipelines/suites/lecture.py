"""The lecture, run: a recipe for every system, and a page of all slides: `cascade lecture`.

A slide shows formulas, the code of the formulas, and images, figures and training time of its systems.
"""

from collections.abc import Mapping, Sequence
from functools import cache, cached_property
from importlib.util import find_spec
from typing import Any, TypeVar

from markupsafe import Markup
from pydantic import Field
from rich.console import Console

from components.configuration.usage import UsageError, nearest
from components.data.listing import SourceError
from components.evaluation.gallery import INDEX_GRIDS, ORIGINALS, TRAINED
from components.evaluation.grids import readable
from components.evaluation.metrics import METRICS, DistanceRow
from components.evaluation.noising_study import draw_reverse_step
from components.evaluation.plots import with_own_ids
from components.evaluation.report import (
    Figure,
    Table,
    described_image,
    figure,
    number,
    page_environment,
    shrunk,
    stage_curves,
)
from components.runtime.storage.artifact import Artifact
from pipelines.engine import driver
from pipelines.engine.display import duration, say
from pipelines.engine.run_report import run_images, run_words, stage_curve, study_of
from pipelines.recipes.catalog import RECIPES, ROWS
from pipelines.suites.compare import Comparison, SystemResult, measured
from pipelines.suites.runner import Key, Result, Stages, Suite, shown_table
from pipelines.suites.slides import LECTURE, Slide, read_code, read_slides

HELD_OUT = "held_out_"
WIDEST, SMALL = 2400, 560  # pixels of an image, and of one beside others
KEPT = (ORIGINALS, TRAINED, INDEX_GRIDS)  # of images of others: left out where a prior over codes makes images
SLIDES = read_slides(LECTURE.read_text())
Item = TypeVar("Item")


class RecipeResult(Result):
    """State of a row's recipe."""

    row: str = Field("", exclude=True)  # T1, P3, ...
    summary: str = Field("", exclude=True)  # the recipe in one line
    figures: dict[str, float] = Field({})  # likelihoods and distances by name
    images: dict[str, bytes] = Field({}, exclude=True)  # name -> PNG
    words: dict[str, tuple[str, ...]] = Field({}, exclude=True)  # name of an image -> conditions
    plots: dict[str, str] = Field({}, exclude=True)  # title -> SVG
    tables: dict[str, Table] = Field({})  # title -> figures
    curves: dict[str, str] = Field({}, exclude=True)  # title -> SVG
    report: str = Field("", exclude=True)  # its address, from that of the page


def run_lecture(lecture: "Lecture", names: list[str], console: Console) -> int:
    """Run the unfinished recipes of rows in turn. Returns 1 if a recipe failed, 130 if interrupted.

    A finished recipe runs too if MLflow does not know its run: its stages are cached, and its results are sent again.
    Rows whose images are not on this machine are left out, and said so. `lecture.html` in storage is written before the
    first recipe and after each: all slides, with what there is by then, and what is missing.
    `names`: rows or recipes to run; empty: all. Raises UsageError for a name that is neither and without the extra
    `lecture`, SourceError for a row that is named but has no images here."""
    if find_spec("latex2mathml") is None:
        raise UsageError("the lecture's page needs the extra lecture: pip install 'image-cascade[lecture]'")
    chosen = chosen_rows(names)
    lecture.write()
    for recipe, obstacle in [(recipe, lecture.results[Key(recipe)].obstacle) for recipe in chosen]:
        if obstacle and names:
            raise SourceError(obstacle)
        if obstacle:
            say(console, f"left out: {recipe}: {obstacle}", "yellow")
            del chosen[recipe]
    titles = {Key(recipe): f"row {row}, {recipe}" for recipe, row in chosen.items()}
    code = lecture.run(titles, noun="recipes", console=console)
    if code != driver.INTERRUPTED:
        finished = [lecture.results[key] for key in titles if not lecture.results[key].missing]
        console.print(shown_table(rows_table(finished), title="The rows"))
        say(console, f"page: {lecture.root.url(lecture.page)}")
    return code


def chosen_rows(names: list[str]) -> dict[str, str]:
    """Recipe -> row, of the rows or recipes named."""
    choices = {*ROWS, *ROWS.values()}
    if unknown := [name for name in names if name not in choices]:
        raise UsageError(f"no row or recipe {unknown[0]!r}{nearest(unknown[0], sorted(choices))}")
    return {recipe: row for recipe, row in ROWS.items() if not names or recipe in names or row in names}


class Lecture(Suite[RecipeResult]):
    """All rows, with seed 0."""

    name, page = "lecture", "lecture.html"

    def keys(self) -> list[Key]:
        return [Key(recipe) for recipe in chosen_rows([])]

    def result(self, key: Key, stages: Stages) -> RecipeResult:
        """Figures, images, plots, curves and training time in the finished stages of a recipe."""
        artifacts, trained, missing = stages
        studies = [study_of(artifact) for artifact in artifacts.values() if "plots" in artifact.metadata]
        curves: dict[str, str] = {}
        for stage, artifact in trained.items():
            points = stage_curve(self.root, stage, artifact.key)
            main = stage_curves(f"{stage}-{artifact.key[:6]}", points)["main"] if points else []  # the loss first
            curves |= {f"{readable(stage)}: {each['metric'].replace('_', ' ')}": str(each["svg"]) for each in main[:3]}
        return RecipeResult(
            recipe=key.recipe,
            **catalog_entry(key.recipe),
            train_seconds=stages.summed("train_seconds"),
            figures=figures_of(artifacts, trained),
            images={name: shrunk(png, width=WIDEST) for name, png in run_images(artifacts).items()},
            words=run_words(artifacts),
            plots={title: svg for study in studies for title, svg in study.plots.items()},
            tables={title: table for study in studies for title, table in study.tables.items()},
            curves=curves,
            report="" if missing else f"runs/{self.runs[key]}/report.html",
            missing=missing,
        )

    def render(self) -> str:
        self.comparison.read()
        results = {key.recipe: result for key, result in self.results.items()}
        return render_lecture(SLIDES, results, self.comparison.ordered())

    @cached_property
    def comparison(self) -> Comparison:
        """The systems of `cascade compare` in the same storage; none before it was asked for."""
        return Comparison(self.root.uri, tracking=self.tracking, profile=self.profile)


def catalog_entry(recipe: str) -> dict[str, str]:
    """Row and summary of a recipe."""
    summary = RECIPES[recipe].summary.partition(": ")[2]
    return {"row": ROWS[recipe], "summary": summary[:1].upper() + summary[1:]}


def figures_of(artifacts: Mapping[str, Artifact], trained: Mapping[str, Artifact]) -> dict[str, float]:
    """Likelihoods of models, headlines of studies, distances of images made, and use of codes, by name."""
    summaries = [item for artifact in trained.values() for item in artifact.metadata["summary"].items()]
    figures = {name.removeprefix(HELD_OUT): value for name, value in summaries if "bits_per" in name}
    for metadata in (artifact.metadata for artifact in artifacts.values()):
        figures |= metadata.get("headline", {})
        rows = [DistanceRow(**row) for row in metadata.get("distances", []) if row["purpose"] == "model"]
        for metric in (name for name, kind in METRICS.items() if kind.headline):
            values = {f"{metric}, {row.name} (N {row.samples})": row.figure(metric) for row in rows}
            figures |= {name: value for name, value in values.items() if value is not None}
        if use := metadata.get("held_out_codebook"):
            figures |= {"codes in use, %": 100 * use["codebook_usage"], "perplexity": use["codebook_perplexity"]}
    return figures


def rows_table(results: Sequence[RecipeResult]) -> Table:
    """A line for each result, with figures by name."""
    rows = []
    for result in results:
        figures = "\n".join(f"{name.replace('_', ' ')}: {value:.4g}" for name, value in result.figures.items())
        rows.append((result.row, result.recipe, duration(result.train_seconds), figures))
    return Table(columns=("row", "recipe", "trained", "figures on held-out images"), rows=tuple(rows))


def render_lecture(
    slides: Sequence[Slide], results: Mapping[str, RecipeResult], systems: Sequence[SystemResult] = ()
) -> str:
    """The page as self-contained HTML without script.
    `results`: by recipe, of all recipes that slides name. `systems`: of the comparison. Raises LookupError for a slide
    whose code stands nowhere."""
    from latex2mathml.converter import convert  # of the extra `lecture`

    chapters: dict[str, list[dict[str, Any]]] = {}
    for place, slide in enumerate(slides, start=1):
        anchor, code = f"slide-{place}", []
        for reference in slide.code:
            lines = read_code(reference)
            first = next(line.number for line in lines if line.is_formula)
            code.append({"place": f"{reference.file}:{first}", "name": reference.name, "lines": lines})
        formulas = [Markup(convert(formula, display="block")) for formula in slide.formulas]
        shown = {"anchor": anchor, "slide": slide, "formulas": formulas, "code": code}
        shown["results"] = [
            shown_result(results[recipe], slide, slides, anchor=f"{anchor}-{recipe}") for recipe in slide.recipes
        ]
        shown["side_by_side"] = side_by_side([results[recipe] for recipe in slide.side_by_side], anchor=anchor)
        chapters.setdefault(slide.chapter, []).append(shown)
    ordered = {recipe: results[recipe] for slide in slides for recipe in slide.recipes}
    page = page_environment(__name__).get_template("lecture.html.j2")
    drawn = {"tree": taxonomy_tree(slides), "comparison": measured(systems), "reverse_step": reverse_step()}
    return page.render(chapters=chapters, results=ordered, **drawn)


@cache
def reverse_step() -> dict[str, Markup]:
    return {title: Markup(svg) for title, svg in draw_reverse_step().items()}


def taxonomy_tree(slides: Sequence[Slide]) -> dict[str, Any]:
    """The root: branches by name, each with branches of its own, and (anchor, slide) of the slides in it."""
    root: dict[str, Any] = {"branches": {}, "slides": []}
    for place, slide in enumerate(slides, start=1):
        branch = root
        for name in slide.branch:
            branch = branch["branches"].setdefault(name, {"branches": {}, "slides": []})
        if slide.branch:
            branch["slides"].append((f"slide-{place}", slide))
    return root


def side_by_side(results: Sequence[RecipeResult], *, anchor: str) -> list[Figure]:
    """The first images that each recipe made, small, with distances; left out where there are none."""
    figures = []
    for result in results:
        for name in [name for name in result.images if described_image(name)[0] == "samples"][:1]:
            distances = [
                f"{key} {number(value)}" for key, value in result.figures.items() if key.startswith("distance")
            ]
            small, title = shrunk(result.images[name], width=SMALL), readable(result.recipe)
            caption = "; ".join([f"{result.row}: {title}", *distances])
            words = result.words.get(name, ())
            figures.append(figure(f"{anchor}-small-{result.recipe}", small, caption, f"Images of {title}", words))
    return figures


def shown_result(result: RecipeResult, slide: Slide, slides: Sequence[Slide], *, anchor: str) -> dict[str, Any]:
    """Images, plots and tables of a recipe by the names in `shows`; without names, the rest of the recipe.
    Names of elements start with the anchor, as each may stand once on a page."""
    named = {name for other in slides if result.recipe in other.recipes for name in other.shows}
    whole = not slide.shows

    def of_slide(items: Mapping[str, Item]) -> dict[str, Item]:
        return {name: item for name, item in items.items() if (name not in named if whole else name in slide.shows)}

    images, figures = of_slide(result.images), []
    for name, png in (own_images(images) if whole else images).items():
        _, caption, alt = described_image(name)
        alt, words = f"{readable(result.recipe)}: {alt}", result.words.get(name, ())
        figures.append(figure(f"{anchor}-{name}", png, caption, alt, words))
    plots, curves = (
        {title: Markup(with_own_ids(svg, anchor)) for title, svg in drawings.items()}
        for drawings in (of_slide(result.plots), result.curves if whole else {})
    )
    shown = {"result": result, "images": figures, "plots": plots, "tables": of_slide(result.tables), "curves": curves}
    return shown | {"whole": whole}  # with figures, curves and minutes: the slide is that of the recipe


def own_images(images: Mapping[str, bytes]) -> Mapping[str, bytes]:
    """Reconstructions of an autoencoder, and images drawn by a VAE; of other recipes the images made."""
    own = {name: png for name, png in images.items() if name not in KEPT}
    return own if any(not name.startswith(("vae_", "real_")) for name in own) else images
