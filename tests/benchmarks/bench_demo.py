"""How much of the demo's wall time passes while nothing trains: start-up, ingest, sampling, measuring, the report.

Read from the last finished `make demo` of this folder: training intervals are those that the stages state
(`train_seconds` before a stage's end), and what at least one of them covers counts as training.
"""

import json
from pathlib import Path
from typing import Any

from components.runtime.storage.artifact import load_artifact
from components.runtime.storage.store import Store, absolute
from pipelines.recipes.catalog import DEMO
from tests.benchmarks.interleaving import Row, row

PROVES = ("components", "pipelines")


def rows(rounds: int) -> list[Row]:
    """One row; none if this folder holds no demo that trained from the start. `rounds` is not needed."""
    root = Store(absolute("runs"))
    plans = [json.loads(path.read_text()) for path in Path("runs/runs").glob(f"{DEMO}-*/plan.json")]
    whole = [plan for plan in plans if all(stage["state"] == "done" for stage in plan["stages"])]
    if not whole:
        print("demo_overhead: no complete `make demo` in ./runs, so no row")
        return []
    plan = max(whole, key=lambda plan: plan["saved"])
    share = 1 - covered(training_intervals(root, plan)) / plan["seconds"]
    return [row("demo_overhead", share, unit="share of wall time")]


def training_intervals(root: Store, plan: dict[str, Any]) -> list[tuple[float, float]]:
    found = []
    for stage in plan["stages"]:
        artifact = load_artifact(root.join("stages", stage["name"], stage["key"]))
        seconds = artifact.metadata.get("summary", {}).get("train_seconds") if artifact is not None else None
        if seconds is not None:
            found.append((stage["finished"] - seconds, stage["finished"]))
    return found


def covered(intervals: list[tuple[float, float]]) -> float:
    """Seconds that at least one interval covers."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(intervals):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total
