"""docs/ROWS.md and docs/RESULTS.md are what slides, tests and figures say, and leave none of the recipes out."""

import io
import re
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import typer.main
from PIL import Image

from components.evaluation.gallery import draw_columns
from pipelines.command.cli import app
from pipelines.recipes.catalog import RECIPES, ROWS
from pipelines.recipes.rows import TAXONOMY
from pipelines.suites.runner import read_figures
from pipelines.suites.slides import LECTURE
from tests.row_documents import COMMAND, FIGURES, OLDER, RESULTS, UNKNOWN, code_now, results_text, rows_text, unmarked
from tests.row_documents import ROWS as ROWS_PAGE
from tests.row_figures import DOCS, IMAGES, LINES, SUMMARIES, cells, together

MISSING = "–"


class Line(NamedTuple):
    """A line of the page's tables."""

    row: str
    thing: str
    made_by: str  # recipes and commands
    held_by: str  # tests


@pytest.fixture(scope="module")
def page(repository: Path) -> list[Line]:
    lines = (repository / "docs/ROWS.md").read_text().splitlines()
    return [Line(*line.strip("| ").split(" | ")) for line in lines if re.match(r"\| [A-Z]\d", line)]


def recipes_of(line: Line) -> set[str]:
    """What stands there as a bare name."""
    return set(re.findall(r"`([a-z0-9_]+)`", line.made_by))


def test_both_pages_are_what_slides_tests_and_figures_say() -> None:
    assert rows_text() == ROWS_PAGE.read_text(), f"docs/ROWS.md is old: `{COMMAND}` writes it"
    results = unmarked(results_text(read_figures(FIGURES)))
    assert results == unmarked(RESULTS.read_text()), f"docs/RESULTS.md is old: `{COMMAND}` writes it"


def test_a_row_is_marked_where_the_code_behind_it_changed_or_is_not_known_whatever_its_date() -> None:
    suites = read_figures(FIGURES)
    for code, said in ((code_now("gan"), ""), ("3.11:0", OLDER), ("", UNKNOWN), ("2.7:0", UNKNOWN)):
        code = code.replace("3.11", ".".join(map(str, sys.version_info[:2])))
        gan = {"recipe": "gan", "figures": {}, "date": "2030-01-02", "code": code}
        others = [entry for entry in suites["lecture"] if entry["recipe"] != "gan"]
        text = results_text(suites | {"lecture": [gan, *others]})
        assert f"2030-01-02{said} |" in text
        assert "2030-01-02 |" in unmarked(text)


def test_images_of_the_rows_are_their_lines_together_and_every_line_is_of_a_row() -> None:
    assert {path.stem for path in LINES.iterdir()} <= {*SUMMARIES}
    for name, rows in IMAGES.items():
        drawn, kept = (Image.open(place) for place in (io.BytesIO(together(row.name for row in rows)), DOCS / name))
        assert np.array_equal(np.asarray(drawn), np.asarray(kept.convert("RGB"))), f"docs/{name} is old: {COMMAND}"


def test_a_line_of_reconstructions_has_each_original_before_its_reconstruction() -> None:
    numbers = np.arange(1, 17, dtype=np.uint8)[:, None, None, None] * np.ones((1, 64, 64, 3), np.uint8)
    pairs = cells(draw_columns({"originals": numbers, "reconstructions": numbers + 100}))
    assert [int(image[64, 64, 0]) for image in pairs] == [1, 101, 2, 102, 3, 103, 4, 104]


def test_a_test_that_a_row_names_and_that_is_nowhere_is_named(tmp_path: Path) -> None:
    with pytest.raises(LookupError, match=r"a row names test_\w+, which no file has: mend it in lecture\.md"):
        rows_text(tests=tmp_path)


def test_figures_of_a_new_measurement_stand_on_the_page_with_their_commit_date_and_machine() -> None:
    measured = {"commit": "abc", "date": "2030-01-02", "machine": "2 cores"}
    suites = read_figures(FIGURES)
    lecture = [entry for entry in suites["lecture"] if entry["recipe"] != "gan"]
    gan = {"recipe": "gan", "figures": {"distance, some (N 9)": 1.25}, "train_seconds": 61.0, **measured}
    text = results_text(suites | {"lecture": [gan, *lecture]})
    assert re.search(
        r"\| G1 \| `gan` \| .* \| distance, some \(scenes at 32², N 9\): 1\.25 \| 1:01 \| abc, 2030-01-02, 2 cores‡ ",
        text,
    )
    assert text.count("\n") == RESULTS.read_text().count("\n")


def test_only_rows_and_systems_that_there_are_have_figures() -> None:
    suites = read_figures(FIGURES)
    assert {entry["recipe"] for entry in suites["lecture"]} <= ROWS.keys()
    assert {entry["recipe"] for entry in suites["compare"]} <= {system.name for system in TAXONOMY}


def test_what_can_be_made_is_held_by_a_test(page: list[Line]) -> None:
    unheld = [line.thing for line in page if (line.made_by == MISSING) != (line.held_by == MISSING)]
    assert unheld == []
    assert all("::" in line.held_by for line in page if line.held_by != MISSING)


def test_every_recipe_stands_on_the_page_and_no_other_name(page: list[Line]) -> None:
    standing = set().union(*map(recipes_of, page))
    assert not RECIPES.keys() - standing, f"give each a line `- row: …` at its slide, in {LECTURE.name}"
    assert not standing - RECIPES.keys(), f"{LECTURE.name} names no recipes"


def test_a_recipe_of_the_lecture_stands_in_its_row(page: list[Line]) -> None:
    standing = {(recipe, line.row) for line in page for recipe in recipes_of(line)}
    left_out = {*ROWS.items()} - standing
    assert not left_out, f"give each a line `- row: …` at its slide, in {LECTURE.name}"


def test_every_command_of_the_page_takes_the_options_that_it_names(page: list[Line]) -> None:
    commands = typer.main.get_command(app).commands  # pyrefly: ignore[missing-attribute]
    for line in page:
        for name, options in re.findall(r"`cascade (\w+)([^`]*)`", line.made_by):
            known = {option for parameter in commands[name].params for option in parameter.opts}
            assert {*re.findall(r"--[a-z-]+", options)} <= known, line
