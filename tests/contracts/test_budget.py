"""The house stays within its budget."""

import subprocess
import tomllib

from tests.house import BUDGET, ROOT, measured

LEDGER = "CHANGELOG.md"


def test_every_count_is_within_its_limit() -> None:
    beyond = [f"{row.name}: {row.value:,.1f}, limit {row.limit:,}" for row in measured() if row.beyond]
    assert not beyond


def test_no_limit_is_tighter_than_its_goal() -> None:
    """A limit that has passed its goal would go on falling for no reason."""
    rows = measured()
    assert not [row.name for row in rows if (row.limit > row.goal if row.least else row.limit < row.goal)]


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
