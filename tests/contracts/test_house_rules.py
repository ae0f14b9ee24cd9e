"""The house can be held in the head: rooms with a sign on the door, no junk drawers, short files and functions."""

import ast
import re

import pytest

TOP_LEVEL = {"components", "docs", "infra", "pipelines", "tests", ".ci"}
JUNK_DRAWER = re.compile(r"(utils?|common|core|helpers?|misc)(\.py)?|base_.*\.py")
ADDRESS = re.compile(r"(pypi|pythonhosted|npmjs|debian)[.](org|com|net)|/(work|farm|root)/[a-z.]+")


def code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function, its docstring not counted."""
    lines = function.end_lineno - function.lineno + 1
    if ast.get_docstring(function):
        lines -= function.body[0].end_lineno - function.body[0].lineno + 1
    return lines


def functions(path) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    nodes = ast.walk(ast.parse(path.read_text()))
    return [node for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def test_the_top_level_holds_the_rooms_and_no_other_folder(repository, tracked_files):
    parents = [path.relative_to(repository).parts for path in tracked_files]
    assert {parts[0] for parts in parents if len(parts) > 1} <= TOP_LEVEL


def test_every_room_has_a_readme(repository):
    rooms = [repository / name for name in ("components", "pipelines", "infra", "tests")]
    rooms += [init.parent for init in repository.glob("components/*/__init__.py")]
    rooms += [folder for folder in repository.glob("infra/*/") if any(folder.iterdir())]
    missing = [room.relative_to(repository).as_posix() for room in rooms if not (room / "README.md").is_file()]
    assert not missing


def test_no_file_is_a_junk_drawer(repository, tracked_files):
    parts = {part for path in tracked_files for part in path.relative_to(repository).parts}
    assert not [part for part in parts if JUNK_DRAWER.fullmatch(part)]


def test_files_stay_under_400_lines(sources):
    assert not [(path, lines) for path in sources if (lines := path.read_text().count("\n")) >= 400]


def test_functions_stay_under_80_lines_and_mostly_far_under(sources):
    lengths = sorted(
        (code_lines(function), f"{path}:{function.name}") for path in sources for function in functions(path)
    )
    assert lengths[-1][0] <= 80, lengths[-1]
    assert lengths[len(lengths) // 2][0] <= 12
    assert lengths[int(len(lengths) * 0.95)][0] <= 60


def test_long_public_functions_say_what_they_do(sources):
    silent = [
        f"{path}:{function.name}"
        for path in sources
        for function in functions(path)
        if not function.name.startswith("_") and code_lines(function) > 15 and not ast.get_docstring(function)
    ]
    assert not silent


def test_no_tracked_file_names_a_registry_or_a_path_of_one_machine(tracked_files):
    found = []
    for path in tracked_files:
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        found += [f"{path}: {match.group()}" for match in ADDRESS.finditer(text)]
    assert not found


@pytest.mark.parametrize("target", ["demo", "lecture", "test", "check", "bench", "faults", "clean"])
def test_every_make_target_is_explained_and_can_be_planned(repository, target):
    makefile = (repository / "Makefile").read_text()
    assert re.search(rf"^{target}:.*  ## \S", makefile, re.MULTILINE)
    assert target in re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE).group(1).split()
