"""One page with every system that was run by its own recipe: what it came to, and images of it."""

from jinja2 import Environment, PackageLoader, StrictUndefined

from components.configuration.config import Config
from components.evaluation.grids import readable
from components.evaluation.report import duration, figure, number


class RowResult(Config):
    """What one row came to."""

    row: str  # T1, P3, ...
    recipe: str
    about: str  # the recipe in one line
    seconds: float | None  # of training
    figures: dict[str, float]  # likelihoods and distances by name
    images: dict[str, bytes]  # name -> PNG
    report: str  # URL


def render_rows(rows: list[RowResult]) -> str:
    """The page as HTML; it holds all it needs."""
    environment = Environment(
        loader=PackageLoader("components.evaluation"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"duration": duration, "number": number, "readable": readable}
    shown = {
        row.recipe: [
            figure(name, png, readable(name), f"{readable(name)}, {row.recipe}") for name, png in image_of(row)
        ]
        for row in rows
    }
    return environment.get_template("rows.html.j2").render(rows=rows, shown=shown)


def image_of(row: RowResult) -> list[tuple[str, bytes]]:
    """What a row is known by: images that it makes, or, if it makes none, what it keeps of others."""
    made = [(name, png) for name, png in row.images.items() if name != "originals_and_reconstructions"]
    return made[:1] or list(row.images.items())[:1]
