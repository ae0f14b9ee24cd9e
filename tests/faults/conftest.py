"""The ledger of a session: which faults were injected how often, and the proof that nothing was lost."""

import json
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

from tests.evidence import REPOSITORY, facts, machine
from tests.faults.runs import Run

LEDGER = REPOSITORY / "faults.json"
rows: list[dict[str, Any]] = []
Record = Callable[..., None]
Undisturbed = Callable[..., dict[str, str]]


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Record:
    """record(fault, times, proof): a row of the table; what the proof is of has been compared already.
    In `faults.json` it replaces what was written of the fault before, at once: a sitting that is cut off loses none."""
    group = request.path.stem.removeprefix("test_")

    def add(fault: str, times: int, proof: str) -> None:
        row = {"group": group, "fault": fault, "times": times, "nothing lost": proof}
        rows.append(row | facts(request.module, machine=machine()))
        known = json.loads(LEDGER.read_text()) if LEDGER.exists() else []
        merged = {(each["group"], each["fault"]): each for each in [*known, rows[-1]]}
        LEDGER.write_text(json.dumps([merged[place] for place in sorted(merged)], indent=1) + "\n")

    return add


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """undisturbed(steps, workers, until): hashes of a run that nobody disturbs, made when it is first asked for."""

    @cache
    def hashes(steps: int, workers: int = 2, until: str = "base") -> dict[str, str]:
        run = Run(tmp_path_factory.mktemp("undisturbed"), steps=steps, workers=workers, until=until)
        run.finish(run.start())
        return run.hashes()

    return hashes


def pytest_terminal_summary() -> None:
    """Print the table of the session."""
    if not rows:
        return
    table = Table("group", "fault", "times", "nothing lost", title="faults injected")
    for row in rows:
        table.add_row(row["group"], row["fault"], str(row["times"]), row["nothing lost"])
    Console(width=120).print(table)
