"""Every measurement of `make bench`: prints one table and writes bench.json.

Each bench_*.py here has `rows(rounds)`, which measures ours and the peer in turn, round by round, so that a
busy machine slows both, and returns a dictionary for each row: name, ours, peer, ratio (our time over the peer's),
unit, cpu_ours, cpu_peer (CPU seconds a round, which other work on the machine does not move).
"""

import importlib
import json
import os
import pathlib
import platform
import subprocess
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

FOLDER = pathlib.Path(__file__).parent
REPOSITORY = FOLDER.parents[1]
RESULT = "bench.json"

Row = dict[str, Any]


def machine() -> dict[str, Any]:
    """CPU model and number of cores that this process may use."""
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"cpu": models[0] if models else platform.processor() or platform.machine(), "cores": cores}


def commit() -> str:
    """The measured commit; `+changes` when the work tree differs from it in more than what is written here."""
    command = ["git", "rev-parse", "--short=12", "HEAD"]
    head = subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, text=True).stdout.strip()
    changed = ["git", "diff", "--quiet", "HEAD", "--", ".", ":!bench*.json"]
    return head if subprocess.run(changed, cwd=REPOSITORY).returncode == 0 else f"{head}+changes"


def keep(path: pathlib.Path, rows: list[Row], facts: Row, *, all_anew: bool) -> None:
    """Write rows with what was the same for all, in the place of those of their names, or of all that are there."""
    kept = {} if all_anew or not path.exists() else {row["name"]: row for row in json.loads(path.read_text())}
    kept |= {row["name"]: row | facts for row in rows}
    path.write_text(json.dumps([*kept.values()], indent=2) + "\n")


def table(rows: list[Row]) -> Table:
    result = Table("name", "ours", "peer", "ours / peer", "unit", "CPU ours / peer")
    for row in rows:
        numbers = [f"{row[key]:.4g}" if row.get(key) is not None else "-" for key in ("ours", "peer", "ratio")]
        cpu = f"{row['cpu_ours'] / row['cpu_peer']:.3g}" if row.get("cpu_ours") and row.get("cpu_peer") else "-"
        result.add_row(row["name"], *numbers, row["unit"], cpu)
    return result


def main(
    names: Annotated[list[str] | None, typer.Argument(help="unet reader_storage …; all if left out")] = None,
    rounds: int = 5,
) -> None:
    """Measure, print the table, and keep it in bench.json, where a row replaces what was measured of it before."""
    every = sorted(path.stem for path in FOLDER.glob("bench_*.py"))
    chosen = [f"bench_{name}" for name in names or []] or every
    if unknown := {*chosen} - {*every}:
        raise typer.BadParameter(f"no benchmark {', '.join(sorted(unknown))}: choose from {', '.join(every)}")
    facts, rows = {"commit": commit(), "machine": machine()}, []
    for module in chosen:
        rows += importlib.import_module(f"tests.benchmarks.{module}").rows(rounds)
        keep(REPOSITORY / RESULT, rows, facts, all_anew=not names)
    Console().print(table(rows))


if __name__ == "__main__":
    typer.run(main)
