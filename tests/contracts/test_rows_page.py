"""docs/ROWS.md names recipes, commands and tests that there are, and leaves none of the lecture's recipes out."""

import ast
import re
from pathlib import Path
from typing import NamedTuple

import pytest
import typer.main

from pipelines.command.cli import app
from pipelines.recipes.catalog import RECIPES, ROWS

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


def functions_of(file: Path) -> set[str]:
    return {node.name for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.FunctionDef)}


def test_every_test_of_the_page_is_there(page: list[Line], repository: Path) -> None:
    named = {tuple(each.split("::")) for line in page for each in re.findall(r"`(\S+::\S+)`", line.held_by)}
    functions = {file: functions_of(repository / "tests" / file) for file, _ in named}
    assert [f"{file}::{name}" for file, name in sorted(named) if name not in functions[file]] == []


def test_what_can_be_made_is_held_by_a_test(page: list[Line]) -> None:
    unheld = [line.thing for line in page if (line.made_by == MISSING) != (line.held_by == MISSING)]
    assert unheld == []
    assert all("::" in line.held_by for line in page if line.held_by != MISSING)


def test_every_recipe_stands_on_the_page_and_no_other_name(page: list[Line]) -> None:
    assert set().union(*map(recipes_of, page)) == RECIPES.keys()


def test_a_recipe_of_the_lecture_stands_in_its_row(page: list[Line]) -> None:
    standing = {(recipe, line.row) for line in page for recipe in recipes_of(line)}
    assert {(recipe.__name__, row) for recipe, row in ROWS.items()} - standing == set()


def test_every_command_of_the_page_takes_the_options_that_it_names(page: list[Line]) -> None:
    commands = typer.main.get_command(app).commands  # pyrefly: ignore[missing-attribute]
    for line in page:
        for name, options in re.findall(r"`cascade (\w+)([^`]*)`", line.made_by):
            known = {option for parameter in commands[name].params for option in parameter.opts}
            assert {*re.findall(r"--[a-z-]+", options)} <= known, line
