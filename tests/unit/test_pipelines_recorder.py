"""The run's recorder: no event is lost on its way, in order, and nobody who emits one ever fails by it."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from ray.exceptions import RayActorError

from components.runtime import events
from components.runtime.storage.store import Store
from components.runtime.tracking.event_log import new_journal, stage_points
from pipelines.engine.recorder import ActorRecorder, RunRecorder
from pipelines.engine.run_report import link_pages, render_run
from tests.unit.test_tracking_journal import EVENTS


@pytest.fixture
def recorder(tmp_path: Path) -> RunRecorder:
    recorder = RunRecorder()
    recorder.log.journal = new_journal(tmp_path / "spool", destination={})
    recorder.emit(events.StagePlanned("base", "k"))
    recorder.emit(events.StageStarted("base", "k", {}, {}, str(tmp_path / "base")))
    return recorder


def written(recorder: RunRecorder) -> list[events.Event]:
    assert recorder.log.journal is not None
    return [record.event for record in recorder.log.journal.records()][2:]


def test_the_log_has_every_event_in_order_but_progress_and_a_warning_as_the_text_of_all_too(recorder: RunRecorder):
    for event in EVENTS:
        recorder.emit(event)
    recorder.emit(events.Warning("base", "less room"))
    said, kinds = written(recorder), [type(event) for event in EVENTS if not isinstance(event, events.Progress)]
    kinds.insert(kinds.index(events.Warning) + 1, events.Text)
    assert [type(event) for event in said] == [*kinds, events.Warning, events.Text]
    assert said[-1] == events.Text("base", "warnings.txt", "base: little room\nbase: less room")


def test_the_machines_load_is_in_the_journal_and_not_in_storage(recorder: RunRecorder, tmp_path: Path):
    values = {"loss": 0.5, "system/load": 9.0}
    recorder.emit(events.Metrics("base", 1, values))
    assert written(recorder) == [events.Metrics("base", 1, values)]
    assert stage_points(Store(str(tmp_path / "base"))) == {1: {"loss": 0.5}}


def test_a_report_keeps_the_links_to_mlflow_when_it_is_drawn_again(tmp_path: Path):
    root, page = Store(str(tmp_path)), "http://mlflow:5000/#/experiments/1/runs/abc"
    plan = {"saved": 1.0, "seconds": 2.0, "facts": {"recipe": "tiny"}, "code_changes": [], "stages": []}
    root.write("runs/r/plan.json", json.dumps(plan).encode())
    root.write("runs/r/recipe.yaml", b"name: tiny")
    link_pages(root, "r", {"run": page})
    for html in (root.read("runs/r/report.html").decode(), render_run(root, "r")[1]):
        assert f'href="{page}"' in html


def test_progress_without_a_loss_keeps_the_last(recorder: RunRecorder):
    for event in (events.Progress("base", 1, 9, rate=2.0, loss=0.5), events.Progress("base", 2, 9)):
        recorder.emit(event)
    (status,) = recorder.snapshot()
    assert (status.step, status.rate, status.loss) == (2, 2.0, 0.5)


def test_the_table_has_the_last_measures_and_all_seconds_of_checkpoints_those_of_earlier_tries_too(
    recorder: RunRecorder, tmp_path: Path
):
    for step, values in enumerate(({"mfu": 0.3, "checkpoint_hold_seconds": 2.0}, {"mfu": 0.4, "loss": 1.0})):
        recorder.emit(events.Metrics("base", step, values))
    recorder.emit(events.Metrics("base", 2, {"checkpoint_hold_seconds": 1.5, "system/load": 9.0}))
    assert recorder.snapshot()[0].measures == {"mfu": 0.4, "checkpoint_hold_seconds": 3.5}
    recorder.emit(events.StageEnded("base", "KILLED"))
    recorder.emit(events.StageStarted("base", "k", {}, {}, str(tmp_path / "base")))
    assert recorder.snapshot()[0].measures == pytest.approx({"mfu": 0.35, "checkpoint_hold_seconds": 3.5})


def test_a_worker_goes_on_when_the_recorder_is_gone():
    def gone(event: events.Event) -> None:
        raise RayActorError

    ActorRecorder(SimpleNamespace(emit=SimpleNamespace(remote=gone))).emit(events.Progress("base", 1, 2))
