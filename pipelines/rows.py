"""Every system of the lecture in turn, each by its own recipe: `cascade rows`, `make rows`."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from components.configuration.optimization import Training
from components.data.errors import SourceError
from components.evaluation.rows_page import RowResult, render_rows
from pipelines import driver
from pipelines.display import duration
from pipelines.recipes.catalog import RECIPES, ROWS
from pipelines.run_report import run_images
from pipelines.workflow import UsageError, nearest

HELD_OUT = "held_out_"
PAGE = "rows.html"


def run_rows(names: list[str], *, storage: str | None, tracking: str | None, profile: str, console: Console) -> int:
    """Run the recipes of the rows in turn; what is finished is cached. Returns 1 if one failed, 130 if interrupted.

    Rows whose images are not on this machine are left out, and said so. Leaves `rows.html` in storage: every row that
    is finished there, with its figures and images.

    Args:
        names: rows or recipes to run; empty: all.

    Raises UsageError for a name that is neither, SourceError for a row that is named but has no images here.
    """
    chosen = chosen_rows(names)
    known, missing = sources_here(storage, tracking, profile)
    for recipe in [recipe for recipe in chosen if recipe in missing]:
        if names:
            raise SourceError(missing[recipe])
        console.print(f"left out: {recipe}: {missing[recipe]}", style="yellow", highlight=False, soft_wrap=True)
        del chosen[recipe]
    failed = []
    for number, (recipe, row) in enumerate(chosen.items(), start=1):
        console.rule(f"{number} of {len(chosen)}: row {row}, {recipe}")
        code = driver.run(options(recipe, storage, tracking, profile), console)
        if code == driver.INTERRUPTED:
            return code
        failed += [recipe] if code != driver.DONE else []
    prepared = [driver.prepare(options(recipe, storage, tracking, profile)) for recipe in known]
    finished = [result for one in prepared if (result := collect_result(one)) is not None]
    root = prepared[0].root
    root.write(PAGE, render_rows(finished).encode())
    console.print(rows_table([result for result in finished if result.recipe in chosen]))
    console.print(f"page: {root.url(PAGE)}", highlight=False, soft_wrap=True)
    if failed:
        console.print(f"failed: {', '.join(failed)}; the same command goes on from here", style="red")
    return driver.FAILED if failed else driver.DONE


def sources_here(storage: str | None, tracking: str | None, profile: str) -> tuple[list[str], dict[str, str]]:
    """Recipes of rows whose images are here, and why those of the others are not."""
    here, missing = [], {}
    for recipe in chosen_rows([]):
        try:
            driver.prepare(options(recipe, storage, tracking, profile))
            here.append(recipe)
        except SourceError as error:
            missing[recipe] = str(error)
    return here, missing


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


def collect_result(prepared: driver.Prepared) -> RowResult | None:
    """Likelihoods that the models of a row state on held-out images, distances of what they made, and images.

    None for a row that is not finished.
    """
    if any(entry.cached is None for entry in prepared.planned):
        return None
    artifacts = {entry.stage.name: entry.cached for entry in prepared.planned if entry.cached is not None}
    trained = [artifacts[entry.stage.name] for entry in prepared.planned if is_training(entry.stage.config)]
    figures = {
        name.removeprefix(HELD_OUT): value
        for artifact in trained
        for name, value in artifact.metadata["summary"].items()
        if "bits_per" in name
    }
    for artifact in artifacts.values():
        figures |= figures_of(artifact.metadata)
    name = prepared.recipe.name
    return RowResult(
        row=chosen_rows([])[name],
        recipe=name,
        about=(RECIPES[name].__doc__ or "").strip().splitlines()[0].partition(": ")[2],
        seconds=sum(artifact.metadata["summary"].get("train_seconds", 0.0) for artifact in trained) or None,
        figures=figures,
        images=run_images(artifacts),
        report=prepared.root.url(f"runs/{prepared.run}/report.html"),
    )


def is_training(config: object) -> bool:
    return isinstance(config, Training)


def figures_of(metadata: Mapping[str, Any]) -> dict[str, float]:
    """What an artifact states: a study its headline, an evaluation distances of what models made, and codes in use."""
    figures = dict(metadata.get("headline", {}))
    made = [found for found in metadata.get("distances", []) if found["purpose"] == "model"]
    figures |= {f"distance, {found['name']} (N {found['samples']})": found["distance"] for found in made}
    if use := metadata.get("held_out_codebook"):
        figures |= {"codebook_usage": use["codebook_usage"], "perplexity": use["codebook_perplexity"]}
    return figures


def rows_table(finished: list[RowResult]) -> Table:
    table = Table("row", "recipe", "trained", "figures on held-out images", title="The rows", title_justify="left")
    for row in finished:
        figures = "\n".join(f"{name.replace('_', ' ')}: {value:.4g}" for name, value in row.figures.items())
        table.add_row(row.row, row.recipe, duration(row.seconds), figures)
    return table
