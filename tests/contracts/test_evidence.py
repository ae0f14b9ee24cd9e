"""Rows of measurements and of injected faults say what they are evidence of; those older than it are listed."""

import datetime
import json
import subprocess
import warnings
from pathlib import Path

import pytest

from tests.evidence import LEDGERS, REPOSITORY, ages

MACHINE_SINCE = "2026-11-28"  # rows of faults from before name the commit that entered them, and no machine
ROWS = [
    (f"{ledger}: {row.get('name') or row['group'] + ', ' + row['fault']}", row)
    for ledger in LEDGERS
    if (REPOSITORY / ledger).exists()
    for row in json.loads((REPOSITORY / ledger).read_text())
]


@pytest.mark.parametrize("row", [row for _, row in ROWS], ids=[name for name, _ in ROWS])
def test_a_row_names_its_commit_date_machine_seed_and_what_it_proves(row: dict) -> None:
    assert len(row["commit"].removesuffix("+changes")) == 12
    assert datetime.date.fromisoformat(row["date"])
    assert row["machine"] or row["date"] < MACHINE_SINCE
    assert isinstance(row["seed"], int)
    assert row["proves"]
    assert [path for path in row["proves"] if not (REPOSITORY / path).exists()] == [], (
        "measure again, or name its place"
    )


def test_every_group_of_faults_has_rows() -> None:
    groups = {path.stem.removeprefix("test_") for path in REPOSITORY.glob("tests/faults/test_*.py")}
    assert groups == {row["group"] for name, row in ROWS if name.startswith("faults.json")}


def test_rows_that_are_older_than_what_they_prove_are_listed() -> None:
    """A warning and no failure: each change of a room would turn main red until hours of faults were injected again."""
    if old := [str(age) for age in ages() if age.changes != 0]:
        warnings.warn("\n".join(["evidence that is older than what it proves:", *old]), stacklevel=1)


def test_a_row_is_as_old_as_the_commits_since_that_touched_what_it_proves(tmp_path: Path) -> None:
    def commit(name: str) -> str:
        (tmp_path / name).write_text((tmp_path / name).read_text() + "+" if (tmp_path / name).exists() else name)
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        for words in (["init", "-q"], ["add", "."], [*who, "commit", "-qm", name]):
            subprocess.run(["git", *words], cwd=tmp_path, check=True)
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=tmp_path, check=True, capture_output=True, text=True)
        return head.stdout[:12]

    first, _, third = commit("store.py"), commit("other.py"), commit("store.py")
    made = {"old": first, "changed": f"{first}+changes", "new": third, "lost": "0123456789ab"}
    rows = [{"fault": name, "commit": of, "proves": ["store.py"]} for name, of in made.items()]
    (tmp_path / "faults.json").write_text(json.dumps(rows))
    assert {age.rows[0]: age.changes for age in ages(tmp_path)} == {"old": 1, "changed": 1, "new": 0, "lost": None}
    assert "this history does not hold" in str([*ages(tmp_path)][-1])
