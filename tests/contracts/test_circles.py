"""No circle: files and rooms import each other in one direction, imports inside functions counted."""

import ast
import pathlib
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise

import pytest

from tests.house import Module

# Excepted, and no second one: the main graph is also a program, `ray job submit -- python pipelines/full_cascade.py`.
PROGRAM = ("pipelines/full_cascade.py", "pipelines/command/cli.py")
ENTRY = "pipelines/__main__.py"  # of `python -m pipelines`; nothing imports it
JAVASCRIPT_IMPORT = re.compile(r"""\b(?:from|import)\s*\(?\s*["'](\.{1,2}/[^"']+)["']""")
Arrows = Mapping[str, set[str]]


def starts_a_program(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"


def imported_modules(trees: list[ast.stmt]) -> Iterator[str]:
    """Every dotted name that is imported at any depth; `from a import b` gives a.b and a."""
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
            yield str(node.module)


def module_name(file: str) -> str:
    return file.removesuffix(".py").replace("/", ".")


@pytest.fixture(scope="module")
def trees(house: list[Module]) -> dict[str, list[ast.stmt]]:
    """File -> its statements; a package's own file, which only says what the package is, is left out."""
    return {module.name: module.tree.body for module in house if not module.name.endswith("__init__.py")}


@pytest.fixture(scope="module")
def arrows(trees: dict[str, list[ast.stmt]]) -> Arrows:
    """File -> files that it imports, without what stands below `if __name__ == "__main__"`."""
    files = {module_name(file): file for file in trees}
    return {
        file: {files[name] for name in imported_modules([s for s in body if not starts_a_program(s)]) if name in files}
        for file, body in trees.items()
    }


def circle(arrows: Arrows) -> list[str]:
    """One circle, its first part at the end again; empty if there is none."""
    try:
        TopologicalSorter(arrows).prepare()
    except CycleError as error:
        return list(error.args[1])[::-1]
    return []


def room(file: str) -> str:
    """The first folder below the package; the graphs are those files of `pipelines` that lie in no folder."""
    package, name, *rest = file.split("/")
    return f"{package}/{name}" if rest else "pipelines/ (graphs)"


def test_no_files_import_each_other_in_a_circle(arrows: Arrows) -> None:
    assert not circle(arrows), " -> ".join(circle(arrows))


def test_no_rooms_import_each_other_in_a_circle(arrows: Arrows) -> None:
    ties: dict[tuple[str, str], list[str]] = defaultdict(list)
    between: dict[str, set[str]] = defaultdict(set)
    for file in arrows.keys() - {ENTRY}:
        for other in arrows[file]:
            if room(file) != room(other):
                between[room(file)].add(room(other))
                ties[room(file), room(other)].append(f"{file} -> {other}")
    rooms = circle(between)
    steps = [f"{a} -> {b}: {', '.join(sorted(ties[a, b]))}" for a, b in pairwise(rooms)]
    assert not rooms, "\n".join(steps)


def test_one_file_alone_imports_more_where_it_is_run_as_a_program(trees: dict[str, list[ast.stmt]]) -> None:
    programs = {
        (file, name)
        for file, body in trees.items()
        for name in imported_modules([statement for statement in body if starts_a_program(statement)])
        if any(module_name(other) == name for other in trees)
    }
    assert programs == {(PROGRAM[0], module_name(PROGRAM[1]))}


def test_nothing_imports_the_entry_of_the_command(arrows: Arrows) -> None:
    assert not [file for file, others in arrows.items() if ENTRY in others]


def test_no_scripts_of_the_page_import_each_other_in_a_circle(repository: pathlib.Path) -> None:
    page = repository / "components" / "serving" / "page"
    scripts = {
        path.name: {pathlib.PurePosixPath(name).name for name in JAVASCRIPT_IMPORT.findall(path.read_text())}
        for path in page.glob("*.js")
    }
    assert sum(map(len, scripts.values())) > len(scripts)
    assert not circle(scripts), " -> ".join(circle(scripts))
