"""The lecture as one page: each slide's formula, the code that is it, and what its systems made, measured and took."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from markupsafe import Markup
from pydantic import Field

from components.configuration.config import Config
from components.evaluation.curves import with_own_ids
from components.evaluation.gallery import INDEX_GRIDS, ORIGINALS
from components.evaluation.grids import readable
from components.evaluation.report import Figure, Table, described_image, figure, page_environment
from pipelines.suites.slides import CodeLine, CodeReference, Slide, read_code

KEPT = (ORIGINALS, INDEX_GRIDS)  # of images of others: left out where a prior over codes makes images


class RecipeResult(Config):
    """What there is of a recipe by now."""

    recipe: str
    row: str  # T1, P3, ...
    summary: str  # the recipe in one line
    seconds: float | None = None  # of training
    figures: dict[str, float] = Field(default_factory=dict)  # likelihoods and distances by name
    images: dict[str, bytes] = Field(default_factory=dict)  # name -> PNG
    words: dict[str, tuple[str, ...]] = Field(default_factory=dict)  # name of an image -> what it was asked for by
    plots: dict[str, str] = Field(default_factory=dict)  # title -> SVG
    tables: dict[str, Table] = Field(default_factory=dict)  # title -> figures
    curves: dict[str, str] = Field(default_factory=dict)  # title -> SVG
    report: str = ""  # its address, from that of the page
    missing: tuple[str, ...] = ()  # stages that are not finished
    obstacle: str = ""  # why it can't be run here


class ShownCode(NamedTuple):
    place: str  # file:line
    name: str
    lines: list[CodeLine]


class ShownResult(NamedTuple):
    result: RecipeResult
    images: list[Figure]
    plots: dict[str, Markup]
    tables: dict[str, Table]
    curves: dict[str, Markup]
    whole: bool  # with figures, curves and minutes: the slide is that of the recipe


class ShownSlide(NamedTuple):
    anchor: str
    slide: Slide
    formulas: list[Markup]
    code: list[ShownCode]
    results: list[ShownResult]


def render_lecture(slides: Sequence[Slide], results: Mapping[str, RecipeResult]) -> str:
    """The page as HTML without script; it holds all it needs.

    Args:
        results: by recipe, of all recipes that slides name.

    Raises LookupError for a slide whose code stands nowhere.
    """
    chapters: dict[str, list[ShownSlide]] = {}
    for number, slide in enumerate(slides, start=1):
        left = {recipe: without(results[recipe], named_elsewhere(slide, recipe, slides)) for recipe in slide.recipes}
        chapters.setdefault(slide.chapter, []).append(shown_slide(slide, left, anchor=f"slide-{number}"))
    homes: dict[str, str] = {}
    for number, slide in enumerate(slides, start=1):
        homes |= {recipe: f"slide-{number}" for recipe in slide.recipes if recipe not in homes or not slide.shows}
    page = page_environment(__name__).get_template("lecture.html.j2")
    ordered = {recipe: results[recipe] for slide in slides for recipe in slide.recipes}
    return page.render(chapters=chapters, results=ordered, homes=homes)


def named_elsewhere(slide: Slide, recipe: str, slides: Sequence[Slide]) -> set[str]:
    """What of a recipe other slides show by name, where this one shows all the rest."""
    others = [other.shows for other in slides if recipe in other.recipes]
    return set() if slide.shows else {name for shows in others for name in shows}


def without(result: RecipeResult, names: Collection[str]) -> RecipeResult:
    """The result without images, plots and tables of these names."""
    fields = {field: getattr(result, field) for field in ("images", "plots", "tables")}
    left = {field: {name: item for name, item in found.items() if name not in names} for field, found in fields.items()}
    return result.model_copy(update=left)


def shown_slide(slide: Slide, results: Mapping[str, RecipeResult], *, anchor: str) -> ShownSlide:
    from latex2mathml.converter import convert  # of the extra `lecture`

    formulas = [Markup(convert(formula, display="block")) for formula in slide.formulas]
    code = [shown_code(reference) for reference in slide.code]
    shown = [shown_result(results[recipe], slide.shows, anchor=f"{anchor}-{recipe}") for recipe in slide.recipes]
    return ShownSlide(anchor, slide, formulas, code, shown)


def shown_code(reference: CodeReference) -> ShownCode:
    lines = read_code(reference)
    first = next(line.number for line in lines if line.is_formula)
    return ShownCode(f"{reference.file}:{first}", reference.name, lines)


def shown_result(result: RecipeResult, shows: Sequence[str], *, anchor: str) -> ShownResult:
    """Of a recipe what the slide shows; names of elements start with the anchor, as each may stand once on a page."""
    images = {name: png for name, png in result.images.items() if name in shows} if shows else own_images(result)
    plots = {title: svg for title, svg in result.plots.items() if not shows or title in shows}
    figures = []
    for name, png in images.items():
        caption, alt = described_image(name)
        words = result.words.get(name, ())
        figures.append(figure(f"{anchor}-{name}", png, caption, f"{readable(result.recipe)}: {alt}", words))
    tables = {title: table for title, table in result.tables.items() if not shows or title in shows}
    return ShownResult(
        result,
        figures,
        inline(plots, anchor=anchor),
        tables,
        inline({} if shows else result.curves, anchor=anchor),
        whole=not shows,
    )


def own_images(result: RecipeResult) -> dict[str, bytes]:
    """What a recipe is known by: reconstructions of an autoencoder, and what a VAE draws; of others, what they make."""
    made = {name: png for name, png in result.images.items() if name not in KEPT}
    return made if any(not name.startswith("vae_") for name in made) else result.images


def inline(drawings: Mapping[str, str], *, anchor: str) -> dict[str, Any]:
    return {title: Markup(with_own_ids(svg, anchor)) for title, svg in drawings.items()}
