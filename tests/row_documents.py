"""Write docs/ROWS.md from slides and tests, docs/RESULTS.md and docs/compare.svg from docs/results.json.

python -m tests.row_documents

Both pages keep what stands outside of their marked places. Rows of the workflow have no slide and stand in docs/ROWS.md
itself; the files of their tests are put in. Figures come by `cascade lecture --json docs/results.json`, and by compare.
Figures of code that has changed since are marked, by digests of its modules and not by dates.
"""

import ast
import platform
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any

from components.evaluation.report import Table, number
from pipelines.engine.code_seen import code_digest, code_of
from pipelines.engine.display import duration
from pipelines.planning.shares import trainings
from pipelines.recipes.catalog import RECIPES
from pipelines.recipes.rows import SIDE
from pipelines.suites.compare import SETS as COMPARED
from pipelines.suites.compare import SYSTEMS, SystemResult, comparison_table, crossings, draw_comparison
from pipelines.suites.lecture import SLIDES, RecipeResult, catalog_entry
from pipelines.suites.runner import Result, read_figures
from pipelines.suites.slides import LECTURE, Slide
from pipelines.workflows import build_workflow

ROOT = Path(__file__).parents[1]
ROWS, RESULTS, FIGURES, CURVES = (
    ROOT / "docs" / name for name in ("ROWS.md", "RESULTS.md", "results.json", "compare.svg")
)
COMMAND = "make documents"
PLACE = re.compile(r"(?P<first><!-- (?P<kind>\w+) (?P<words>.*?) -->\n).*?(?P<last>\n<!-- /(?P=kind) -->)", re.DOTALL)
TEST = re.compile(r"`(?:(?:\w+/)*(?P<stem>\w+)(?:\.py)?::)?(?P<name>test_\w+)`")
SETS = {"openmoji": "OpenMoji", "scenes": "scenes", "fashion_mnist": "Fashion-MNIST"}
MAKES = re.compile("vae|tokenizer|pixelcnn|row_lstm|gan|base|upsampler|image_to_image")  # trainings of what is measured
OLDER, UNKNOWN = "†", "‡"
UNMEASURED = "Not measured yet: `cascade compare --json docs/results.json` does it."
Suites = Mapping[str, Sequence[Mapping[str, Any]]]


def rows_text(slides: Sequence[Slide] = SLIDES, *, tests: Path = ROOT / "tests") -> str:
    """docs/ROWS.md with the rows of slides in its places, and each test with its file.

    Raises LookupError for a name that no test has, or that tests of several files have.
    """
    files: dict[str, list[Path]] = defaultdict(list)
    for path in sorted(tests.rglob("test_*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                files[node.name].append(path.relative_to(tests))

    def with_file(match: re.Match[str]) -> str:
        name = match["name"]
        paths = [path for path in files[name] if len(files[name]) == 1 or path.stem == match["stem"]]
        if len(paths) != 1:
            places = ", ".join(map(str, files[name])) or "no file"
            raise LookupError(
                f"a row names {name}, which {places} has: mend it in {LECTURE.name}, or in {ROWS.name} for rows W and L"
            )
        return f"`{paths[0].as_posix()}::{name}`"

    def rows(match: re.Match[str]) -> str:
        letters = match["words"].split()
        lines = [line for slide in slides for line in slide.rows if line[0] in letters]
        lines.sort(key=lambda line: (letters.index(line[0]), int(line[1:].partition(" ")[0])))
        table = markdown(("row", "what it takes", "recipe or command", "held by"), lines)
        return f"{match['first']}{table}{match['last']}"

    return TEST.sub(with_file, PLACE.sub(rows, ROWS.read_text()))


def results_text(suites: Suites) -> str:
    """docs/RESULTS.md with figures in its places: of rows, of systems, and tables of one recipe by title."""

    def figures(match: re.Match[str]) -> str:
        if match["kind"] == "results":
            text = rows_table(suites["lecture"], match["words"])
        elif match["kind"] == "systems":
            text = systems_table(compared(suites), match["words"])
        elif match["kind"] == "crossings":
            text = "\n".join(f"- {line}" for line in crossings(compared(suites))) or UNMEASURED
        else:
            recipe, _, title = match["words"].partition(": ")
            (entry,) = [entry for name in ("demo", "lecture") for entry in suites[name] if entry["recipe"] == recipe]
            table = Table.model_validate(entry["tables"][title])
            columns = [told(column, recipe) for column in table.columns]
            text = markdown(columns, [" | ".join(map(number, row)) for row in table.rows])
        return f"{match['first']}{text}{match['last']}"

    return PLACE.sub(figures, RESULTS.read_text())


def rows_table(entries: Sequence[Mapping[str, Any]], words: str) -> str:
    """Results whose `row recipe` is like one of the patterns before `not`, and like none of those behind it."""
    likes, _, unlikes = words.partition(" not ")
    results = [RecipeResult(**(catalog_entry(entry["recipe"]) | entry)) for entry in entries]
    lines = []
    for result in sorted(results, key=lambda result: int(result.row[1:])):
        name = f"{result.row} {result.recipe}"
        if any(fnmatch(name, like) for like in likes.split()) and not any(
            fnmatch(name, not_) for not_ in unlikes.split()
        ):
            named = {told(figure, result.recipe): value for figure, value in result.figures.items()}
            figures = [f"{figure.replace('_', ' ')}: {value:.4g}" for figure, value in named.items()]
            cells = (
                "; ".join([*figures, *filter(None, [result.note])]),
                duration(result.train_seconds),
                origin(result),
            )
            lines.append(f"{result.row} | `{result.recipe}` | {result.summary.rstrip('.')} | {' | '.join(cells)}")
    lines.sort(key=lambda line: "TPGD".index(line[0]))
    return markdown(("row", "recipe", "system", "on held-out images", "trained", "of"), lines)


def compared(suites: Suites) -> list[SystemResult]:
    """The results of `cascade compare`, by system, budget and seed."""
    words = {recipe: {"title": system.title, "branch": system.branch} for recipe, system in SYSTEMS.items()}
    systems = [SystemResult(**(words[entry["recipe"]] | entry)) for entry in suites["compare"]]
    return sorted(systems, key=lambda system: ([*SYSTEMS].index(system.recipe), system.minutes, system.seed))


def systems_table(systems: Sequence[SystemResult], name: str) -> str:
    """The table of `cascade compare` on a set, with the origin of each row."""
    own = [system for system in systems if COMPARED[system.source] == name]
    table = comparison_table(own)
    origins = [*map(origin, own), *["–"] * (len(table.rows) - len(own))]
    lines = [" | ".join([*map(str, row), of]) for row, of in zip(table.rows, origins, strict=True)]
    columns = [f"{column} ({name} at {SIDE}²)" if column == "distance" else column for column in table.columns]
    return markdown((*columns, "of"), lines) if own else UNMEASURED


def told(name: str, recipe: str) -> str:
    """Name of a figure; that of a distance with the images that it is measured to, and their size where it has none."""
    if not name.startswith("distance"):
        return name
    workflow = build_workflow(RECIPES[recipe]())
    sides = [training.data.resolution for stage, training in trainings(workflow).items() if MAKES.match(stage)]
    side = "" if "²" in name else f" at {max(filter(None, sides))}²"
    to = f"{SETS[workflow.stages[0].config.source]}{side}"
    return name.replace("(N ", f"({to}, N ") if "(N " in name else f"{name} ({to})"


def origin(result: Result) -> str:
    """Commit, date and machine, as far as they were written down, and a mark where the code is not that of today."""
    return ", ".join(filter(None, (result.commit, result.date, result.machine))) + mark(result)


def mark(result: Result) -> str:
    """OLDER where a module behind the result has changed since, UNKNOWN where that can't be told."""
    python = result.code.partition(":")[0]
    now = code_now(result.recipe) if python == ".".join(platform.python_version_tuple()[:2]) else ""
    return UNKNOWN if not now else OLDER if result.code != now else ""


@cache
def code_now(recipe: str) -> str:
    return code_digest({stage.name: code_of(stage) for stage in build_workflow(RECIPES[recipe]()).stages})


def unmarked(text: str) -> str:
    """A page without the marks, which any change of code may move: they are written with the page."""
    return re.sub(f"[{OLDER}{UNKNOWN}](?= \\|)", "", text)


def markdown(columns: Sequence[str], lines: Sequence[str]) -> str:
    """A table in Markdown; each line has its cells parted by ` | `."""
    return "\n".join([f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}", *(f"| {line} |" for line in lines)])


if __name__ == "__main__":
    ROWS.write_text(rows_text())
    suites = read_figures(FIGURES)
    RESULTS.write_text(results_text(suites))
    if drawing := draw_comparison(compared(suites)):
        CURVES.write_text(drawing.replace("<svg ", '<svg style="background: white" ', 1))
