"""Events as the journal has them: a journal of an earlier version and one of this are written alike."""

import json
from pathlib import Path
from typing import Any

from components.runtime import events
from components.runtime.storage.artifact import Artifact, FileEntry
from components.runtime.tracking.lines import line_of

OLD = Path(__file__).parents[1] / "old_journal.jsonl"  # as the version before these events wrote it
ABOUT = {"time", "run", "models", "stage", "key"}  # what the tracker adds to a line


def artifact(stage: str, key: str, **more: Any) -> Artifact:
    files = (FileEntry(path="a.json", bytes=12, sha256="0" * 64),)
    about: dict[str, Any] = {"metadata": {"samples": 7}, "root": f"s3://bucket/stages/{stage}/{key}", **more}
    return Artifact(kind="report", stage=stage, key=key, files=files, **about)


POINTS: list[events.Point] = [("loss", 1, 0.5, 1000)]
SAME: list[events.Event] = [
    events.RunStarted(
        "old",
        "name: tiny\n",
        {"name": "tiny", "base": {"betas": [0.9, 0.99]}},
        {"name": "tiny", "git_commit": "abc123"},
    ),
    events.StageCached("images", artifact("images", "k1", provenance={"run": "another"}), POINTS),
    events.StageStarted("base", "k2", {"total_steps": 2}, {"images": artifact("images", "k1")}, POINTS),
    events.Metrics("base", 2, {"loss": 0.25, "rate": 5}, time_ms=2000),
    events.Image("base", 2, "samples/grid", b""),
    events.Text("base", "notes.md", "all well"),
    events.StageEnded("base", "FINISHED", artifact("base", "k2")),
    events.StageStarted("prior", "k3", {}, {}),
    events.StageEnded("prior", "FAILED", error="worker died"),
    events.StageStarted("samples", "k4", {}, {}),
    events.StageEnded("samples", "KILLED"),
    events.RunEnded("FAILED"),
]


def test_events_are_written_as_the_version_before_wrote_them_and_a_field_may_be_added():
    old = [json.loads(line) for line in OLD.read_text().splitlines()]
    lines = [line_of(event, time_ms=0, write_blob=lambda data, suffix: f"old{suffix}") for event in SAME]
    wanted = [{name: value for name, value in line.items() if name not in ABOUT} for line in old]
    written = json.loads(json.dumps(lines))
    known = [{name: line.get(name) for name in each} for line, each in zip(written, wanted, strict=True)]
    assert known == wanted


def test_points_without_a_time_have_that_of_their_line():
    line = line_of(events.Metrics("base", 2, {"loss": 0.25}), time_ms=7, write_blob=lambda data, suffix: "")
    assert line == {"event": "metrics", "points": [["loss", 2, 0.25, 7]]}
