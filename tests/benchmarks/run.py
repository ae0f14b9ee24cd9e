"""Every measurement of `make bench`: prints one table and writes bench.json.

Each bench_*.py here has `rows(rounds)`, which measures ours and the peer in turn, round by round, so that a
busy machine slows both, and returns a dictionary for each row: name, ours, peer, ratio (our time over the peer's),
unit, cpu_ours, cpu_peer (CPU seconds a round, which other work on the machine does not move).
"""

import importlib
import json
import pathlib
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from tests.evidence import REPOSITORY, Row, facts, machine

FOLDER = pathlib.Path(__file__).parent
RESULT = "bench.json"
SEED = 0  # of what a module draws without a generator of its own


def keep(path: pathlib.Path, rows: list[Row], *, all_anew: bool) -> None:
    """Write rows in the place of those of their names, or of all that are there."""
    kept = {} if all_anew or not path.exists() else {row["name"]: row for row in json.loads(path.read_text())}
    kept |= {row["name"]: row for row in rows}
    path.write_text(json.dumps([*kept.values()], indent=2) + "\n")


def table(rows: list[Row]) -> Table:
    result = Table("name", "ours", "peer", "ours / peer", "unit", "CPU ours / peer")
    for row in rows:
        numbers = [f"{row[key]:.4g}" if row.get(key) is not None else "-" for key in ("ours", "peer", "ratio")]
        cpu = f"{row['cpu_ours'] / row['cpu_peer']:.3g}" if row.get("cpu_ours") and row.get("cpu_peer") else "-"
        result.add_row(row["name"], *numbers, row["unit"], cpu)
    return result


def main(
    names: Annotated[
        list[str] | None, typer.Argument(help="unet reader_storage …; all but quality if left out")
    ] = None,
    rounds: int = 5,
) -> None:
    """Measure, print the table, and keep it in bench.json, where a row replaces what was measured of it before."""
    every = sorted(path.stem for path in FOLDER.glob("bench_*.py"))
    chosen = [f"bench_{name}" for name in names or []] or every
    if unknown := {*chosen} - {*every}:
        raise typer.BadParameter(f"no benchmark {', '.join(sorted(unknown))}: choose from {', '.join(every)}")
    rows: list[Row] = []
    for name in chosen:
        module = importlib.import_module(f"tests.benchmarks.{name}")
        if not names and getattr(module, "ON_REQUEST", False):
            continue
        torch.manual_seed(SEED)
        rows += [row | facts(module, machine=machine()) for row in module.rows(rounds)]
        keep(REPOSITORY / RESULT, rows, all_anew=not names)
    Console().print(table(rows))


if __name__ == "__main__":
    typer.run(main)
