"""The house can be held in the head: rooms with a sign on the door, no junk drawers; sizes stand in the budget."""

import ast
import re

import pytest

from tests.house import length

TOP_LEVEL = {"components", "docs", "infra", "pipelines", "tests", ".ci"}
JUNK_DRAWER = re.compile(r"(utils?|common|core|helpers?|misc)(\.py)?|base_.*\.py")
ADDRESS = re.compile(r"(pypi|pythonhosted|npmjs|debian)[.](org|com|net)|/(work|farm|root)/[a-z.]+")


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


def test_nineteen_of_twenty_functions_stay_under_60_lines_and_long_public_ones_say_what_they_do(house):
    lengths = {(module.name, each): length(each) for module in house for each in module.functions}
    assert sorted(lengths.values())[int(len(lengths) * 0.95)] <= 60
    long = [(name, each) for (name, each), lines in lengths.items() if lines > 15 and each.name[0] != "_"]
    assert not [f"{name}:{each.name}" for name, each in long if not ast.get_docstring(each)]


def test_no_tracked_file_names_a_registry_or_a_path_of_one_machine(tracked_files):
    texts = {path: path.read_text(errors="ignore") for path in tracked_files}
    assert not [f"{path}: {match.group()}" for path, text in texts.items() for match in ADDRESS.finditer(text)]


@pytest.mark.parametrize("target", ["demo", "lecture", "test", "check", "bench", "faults", "clean"])
def test_every_make_target_is_explained_and_can_be_planned(repository, target):
    makefile = (repository / "Makefile").read_text()
    assert re.search(rf"^{target}:.*  ## \S", makefile, re.MULTILINE)
    assert target in re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE).group(1).split()
