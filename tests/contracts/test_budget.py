"""The house stays within its budget, and its counts see what they are to see."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

from tests.house import BUDGET, ROOT, Module, counts, first_lines, helpers, measured, modules, unused

LEDGER = "CHANGELOG.md"

ROOM = '''"""Of a room, what it holds."""

from components.other.place import taken


def called():
    """A function with one caller."""
    return taken()


def caller():
    """Calls it."""
    return called()


class Kept:
    """That which nobody names."""
'''
OTHER = '''"""Another place."""

def taken():
    """Return one."""
    return 1
'''


@pytest.fixture
def house(tmp_path: Path) -> list[Module]:
    """Two files of two rooms."""
    for place, text in {"room/file": ROOM, "other/place": OTHER}.items():
        path = tmp_path / "components" / f"{place}.py"
        path.parent.mkdir(parents=True)
        path.write_text(text)
    (tmp_path / "pipelines").mkdir()
    return modules(tmp_path)


def test_every_count_is_within_its_limit() -> None:
    beyond = [f"{row.name}: {row.value:,.1f}, limit {row.limit:,}" for row in measured() if row.beyond]
    assert not beyond


def test_no_limit_is_tighter_than_its_goal() -> None:
    """A limit that has passed its goal would go on falling for no reason."""
    rows = measured()
    assert not [row.name for row in rows if (row.limit > row.goal if row.least else row.limit < row.goal)]


def test_functions_of_one_caller_and_what_nobody_calls_are_counted(house: list[Module], tmp_path: Path) -> None:
    assert helpers(house) == ["components/other/place.py:3 taken", "components/room/file.py:6 called"]
    assert unused(house, tmp_path) == ["components/room/file.py:Kept", "components/room/file.py:caller"]


def test_a_manifest_is_a_user(house: list[Module], tmp_path: Path) -> None:
    (tmp_path / "infra").mkdir()
    (tmp_path / "infra/service.yaml").write_text("import_path: image_cascade.components.room.file:caller")
    assert unused(house, tmp_path) == ["components/room/file.py:Kept"]


def test_openings_pronouns_and_lines_of_code_are_counted(house: list[Module], tmp_path: Path) -> None:
    values = counts(house, tmp_path)
    assert values["docstrings with a riddling opening"] == 2
    words = sum(len(re.findall(r"[A-Za-z']+", line)) for _, line in first_lines(house))
    # what, it; one; it; That, which; one
    assert values["pronouns in 100 words of first lines"] == pytest.approx(100 * 7 / words)
    assert values["lines components/room"] == ROOM.count("\n")
    assert sum(len(module.code) for module in house) == 5 + 2


def test_a_limit_that_rose_is_explained_in_the_changelog() -> None:
    before = previous_budget()
    text = (ROOT / LEDGER).read_text()
    reasons = [line for line in text.splitlines() if "Grew because" in line]
    now = tomllib.loads(BUDGET.read_text())
    for name, row in before.items():
        sign = -1 if row.get("least") else 1
        if name in now and sign * now[name]["limit"] > sign * row["limit"]:
            assert any(name in line for line in reasons), f"{name}: say why under 'Grew because' in {LEDGER}"


def previous_budget() -> dict[str, dict[str, float]]:
    """The table before the commit that last changed it; empty where this history does not hold one."""
    place = BUDGET.relative_to(ROOT).as_posix()
    git = ["git", "-C", str(ROOT)]
    log = subprocess.run([*git, "log", "-2", "--format=%H", "--", place], capture_output=True, text=True, check=False)
    commits = log.stdout.split()
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", place], check=False).returncode
    commits = commits[:1] if changed else commits[1:]
    if not commits:
        return {}
    shown = subprocess.run([*git, "show", f"{commits[0]}:{place}"], capture_output=True, text=True, check=True)
    return tomllib.loads(shown.stdout)
