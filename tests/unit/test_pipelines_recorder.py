"""The run's recorder: no event is lost on its way, in order, and nobody who emits one ever fails by it."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
from ray.exceptions import RayActorError

from components.runtime import events
from components.runtime.storage.artifact import Artifact
from components.runtime.tracking.lines import line_of
from pipelines.engine.recorder import HANDLERS, ActorRecorder, RunRecorder

KNOWN: dict[type, Any] = {  # one event of each type
    type(event): event
    for event in (
        events.StagePlanned("base", "k"),
        events.RunStarted("run", "", {}, {"name": "tiny"}),
        events.StageHeld("base", "queued", "another driver has it"),
        events.StageStarted("base", "k", {}, {}),
        events.Progress("base", 1, 2),
        events.Metrics("base", 1, {"loss": 0.5}),
        events.Image("base", 1, "grid", b""),
        events.Text("base", "notes.md", "all well"),
        events.Warning("base", "little room"),
        events.StageEnded("base", "FAILED", error="worker died"),
        events.StageCached("base", Artifact(kind="report", stage="base", key="k", files=())),
        events.ModelsDescribed("Recipe `tiny`.", "Run `run`."),
        events.RunEnded("FAILED"),
    )
}


class Emitted(list[Any]):
    """What MLflow's tracker would be told."""

    def emit(self, event: events.Event) -> None:
        self.append(event)


@pytest.fixture
def recorder(tmp_path: Path) -> RunRecorder:
    recorder = RunRecorder(root=str(tmp_path), run="run", tracking=None)
    recorder.emit(events.StagePlanned("base", "k"))
    recorder.emit(events.StageStarted("base", "k", {}, {}))
    recorder.tracker = Emitted()  # pyrefly: ignore[bad-assignment]
    return recorder


@pytest.mark.parametrize("kind", get_args(events.Event))
def test_every_event_is_shown_by_the_table_or_by_mlflow(kind: type):
    written = line_of(KNOWN[kind], time_ms=0, write_blob=lambda data, suffix: "")
    assert kind in HANDLERS or written is not None


def test_mlflow_gets_every_event_in_order_and_a_warning_as_the_text_of_all(recorder: RunRecorder):
    for event in KNOWN.values():
        recorder.emit(event)
    recorder.emit(events.Warning("base", "less room"))
    *said, last = recorder.tracker
    assert [type(event) for event in said] == [events.Text if k is events.Warning else k for k in KNOWN]
    assert last == events.Text("base", "warnings.txt", "base: little room\nbase: less room")


def test_a_point_has_one_time_in_storage_and_in_mlflow(recorder: RunRecorder, tmp_path: Path):
    recorder.emit(events.Metrics("base", 1, {"loss": 0.5, "system/load": 9.0}))
    recorder.emit(events.Progress("base", 2, 2))  # saves the curve
    (point, _) = recorder.tracker
    curve = json.loads((tmp_path / "stages" / "base" / "k" / "curve.json").read_text())
    assert curve == {"1": {"loss": 0.5, "time": point.time_ms}}


def test_progress_without_a_loss_keeps_the_last(recorder: RunRecorder):
    for event in (events.Progress("base", 1, 9, rate=2.0, loss=0.5), events.Progress("base", 2, 9)):
        recorder.emit(event)
    (status,) = recorder.snapshot()
    assert (status.step, status.rate, status.loss) == (2, 2.0, 0.5)


def test_the_table_has_the_last_measures_and_all_seconds_of_checkpoints_those_of_earlier_tries_too(
    recorder: RunRecorder,
):
    for step, values in enumerate(({"mfu": 0.3, "checkpoint_hold_seconds": 2.0}, {"mfu": 0.4, "loss": 1.0})):
        recorder.emit(events.Metrics("base", step, values))
    recorder.emit(events.Metrics("base", 2, {"checkpoint_hold_seconds": 1.5, "system/load": 9.0}))
    assert recorder.snapshot()[0].measures == {"mfu": 0.4, "checkpoint_hold_seconds": 3.5}
    recorder.emit(events.StageEnded("base", "KILLED"))
    recorder.emit(events.StageStarted("base", "k", {}, {}))
    assert recorder.snapshot()[0].measures == pytest.approx({"mfu": 0.35, "checkpoint_hold_seconds": 3.5})


def test_a_worker_goes_on_when_the_recorder_is_gone():
    def gone(event: events.Event) -> None:
        raise RayActorError

    ActorRecorder(SimpleNamespace(emit=SimpleNamespace(remote=gone))).emit(events.Progress("base", 1, 2))
