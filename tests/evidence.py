"""What a measurement or an injected fault is evidence of: of which commit, when, on which machine, with which seed, and
whether what it proves has changed since. `python -m tests.evidence` lists the rows that are older than what they prove.
"""

import ast
import datetime
import json
import os
import pathlib
import platform
import subprocess
from collections.abc import Iterator
from types import ModuleType
from typing import Any, NamedTuple

from pipelines.engine import provenance

REPOSITORY = pathlib.Path(__file__).parents[1]
LEDGERS = ("bench.json", "bench-gpu.json", "faults.json")

Row = dict[str, Any]


class Age(NamedTuple):
    """How rows of one ledger, one commit and the same proof stand to the commit that is checked out."""

    ledger: str
    rows: tuple[str, ...]
    commit: str
    changes: int | None  # commits since then that touched what they prove; None: this history lacks the commit

    def __str__(self) -> str:
        since = f"{self.changes} commits changed what they prove since"
        if self.changes is None:
            since = "which this history does not hold (a shallow clone?), so that nobody can say what changed since"
        shown = ", ".join(self.rows[:3]) + (f" and {len(self.rows) - 3} more" if len(self.rows) > 3 else "")
        return f"{self.ledger}: {shown}: of {self.commit}, {since}"


def facts(module: ModuleType, *, machine: Row) -> Row:
    """What a row says of its making. `module` measures or injects: its `SEED` decides what it draws (0 where it draws
    nothing and its recipe decides), its `PROVES` names files and rooms; left out: what it imports of the product."""
    paths = getattr(module, "PROVES", None) or imported(pathlib.Path(module.__file__ or ""))
    now = datetime.datetime.now(datetime.UTC)
    about = {"commit": commit(), "date": now.date().isoformat(), "machine": machine, "seed": getattr(module, "SEED", 0)}
    return about | {"proves": [*paths]}


def machine() -> Row:
    """CPU model and number of cores that this process may use."""
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"cpu": models[0] if models else platform.processor() or platform.machine(), "cores": cores}


def commit() -> str:
    """The commit that is checked out; `+changes` where the work tree differs from it in more than these ledgers."""
    return provenance.short(provenance.commit(REPOSITORY, of=(".", *(f":!{name}" for name in LEDGERS))))


def imported(file: pathlib.Path) -> list[str]:
    """Paths of the product's modules that a file imports."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    paths = {f"{name.replace('.', '/')}.py" for name in names if name.startswith(("components.", "pipelines."))}
    return sorted(path for path in paths if (REPOSITORY / path).is_file())


def ages(repository: pathlib.Path = REPOSITORY) -> Iterator[Age]:
    """Of all rows, those of one commit and proof together."""
    for ledger in LEDGERS:
        if not (repository / ledger).exists():
            continue
        groups: dict[tuple[str, tuple[str, ...]], list[str]] = {}
        for row in json.loads((repository / ledger).read_text()):
            groups.setdefault((row["commit"], tuple(row["proves"])), []).append(row.get("name") or row["fault"])
        for (made, paths), rows in groups.items():
            yield Age(ledger, tuple(rows), made, changes_since(made, paths, repository))


def changes_since(made: str, paths: tuple[str, ...], repository: pathlib.Path) -> int | None:
    """Number of commits after `made` that touched any of the paths; None where this history lacks `made`."""
    base = made.removesuffix("+changes")
    if git("merge-base", "--is-ancestor", base, "HEAD", repository=repository).returncode:
        return None
    return int(git("rev-list", "--count", f"{base}..HEAD", "--", *paths, repository=repository).stdout)


def git(*arguments: str, repository: pathlib.Path = REPOSITORY) -> subprocess.CompletedProcess:
    return subprocess.run(["git", *arguments], cwd=repository, capture_output=True, text=True)


if __name__ == "__main__":
    for age in ages():
        if age.changes != 0:
            print(age)
