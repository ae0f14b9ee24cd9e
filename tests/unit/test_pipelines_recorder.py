"""A run as its recorder keeps it and a user sees it: no event is lost, each warning comes once, nobody fails by it."""

import io
import json
import logging
import re
import resource
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
from ray.exceptions import RayActorError
from rich.console import Console

from components.evaluation.measures import MEASURES
from components.runtime import events
from components.runtime.execution import Resources
from components.runtime.storage.artifact import Artifact, commit_artifact
from components.runtime.storage.store import Store
from components.runtime.tracking.event_log import open_journal, stage_points
from components.stages.context import Pace
from pipelines.engine.display import Display, run_tables, status_line
from pipelines.engine.execute import WAIT_WARNING_SECONDS, _starved
from pipelines.engine.recorder import ActorRecorder, RunRecorder, StageStatus
from pipelines.engine.run_report import link_pages, render_run
from tests.unit.test_evaluation_report import Page
from tests.unit.test_tracking_journal import EVENTS


@pytest.fixture
def recorder(tmp_path: Path) -> RunRecorder:
    recorder = RunRecorder()
    recorder.log.journal = open_journal(tmp_path / "spool", destination={})
    recorder.emit(events.StageStarted("base", "k", {}, {}, str(tmp_path / "base")))
    return recorder


def written(recorder: RunRecorder) -> list[events.Event]:
    assert recorder.log.journal is not None
    return [record.event for record in recorder.log.journal.records()][1:]


def test_the_log_has_every_event_in_order_but_progress_and_a_warning_as_the_text_of_all_too(recorder: RunRecorder):
    for event in EVENTS:
        recorder.emit(event)
    recorder.emit(events.Warning("base", "less room"))
    said, kinds = written(recorder), [type(event) for event in EVENTS if not isinstance(event, events.Progress)]
    kinds.insert(kinds.index(events.Warning) + 1, events.Text)
    assert [type(event) for event in said] == [*kinds, events.Warning, events.Text]
    assert said[-1] == events.Text("base", "warnings.txt", "base: little room\nbase: less room")


def test_stages_at_work_say_which_store_is_waited_for_until_it_is_back(
    recorder: RunRecorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    recorder.emit(events.StageHeld("prior", "waiting"))
    recorder.emit(events.Progress("base", 1, 10))
    recorder.waits("s3://bucket", "store s3://bucket away for 0:05", ended=False)
    recorder.waits("s3://bucket", "store s3://bucket away for 2:10", ended=False)
    assert [status.note for status in recorder.snapshot()] == ["store s3://bucket away for 2:10", ""]
    assert "running, step 1/10, store s3://bucket away for 2:10" in status_line(recorder.snapshot()[0])
    recorder.log.store("base")
    monkeypatch.setattr(recorder.log, "store", lambda *_, **__: pytest.fail("a store that is away was asked"))
    recorder.emit(events.Metrics("base", 1, {"loss": 0.5}))
    for _ in range(2):  # a second process had waited too
        recorder.waits("s3://bucket", "store s3://bucket was away for 2:20", ended=True)
    assert [status.note for status in recorder.snapshot()] == ["", ""]
    assert recorder.warnings == ["store s3://bucket was away for 2:20"]
    recorder.waits("s3://bucket", "store s3://bucket away for 0:05", ended=False)
    monkeypatch.setattr("pipelines.engine.recorder.FORGOTTEN_SECONDS", 0.0)  # by a process that was killed
    assert [status.note for status in recorder.snapshot()] == ["", ""]


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


def test_a_report_has_the_finished_run_of_the_same_recipe_before_it_and_what_differs(tmp_path: Path):
    root = Store(str(tmp_path))
    for number, (run, recipe, state) in enumerate(
        [("a-1", "tiny", "done"), ("a-2", "tiny", "done"), ("a-3", "other", "done"), ("a-4", "tiny", "failed")]
    ):
        rows = [{"name": "branch, 8²", "distance": 90.0 + number, "samples": 9, "purpose": "model"}]
        metadata = {"feature_network": "net", "distances": rows}
        store = root.join("stages", "evaluation", run)
        commit_artifact(store, Artifact(kind="report", stage="evaluation", key=run, files=(), metadata=metadata))
        stage = {"name": "evaluation", "key": run, "inputs": [], "state": state, "note": ""}
        stages = [stage | {"started": 0.0, "finished": 1.0}]
        plan = {"saved": number, "seconds": 2.0, "facts": {"recipe": recipe}, "code_changes": [], "stages": stages}
        root.write(f"runs/{run}/plan.json", json.dumps(plan).encode())
        root.write(f"runs/{run}/recipe.yaml", f"name: {recipe}\nsteps: {number}\n".encode())
    for second in range(2):  # of two tries
        warning = events.Warning("evaluation", "a part was damaged")
        entry = events.LogEntry(second, "a-4", "tiny", "a-4", warning)
        root.write(f"stages/evaluation/a-4/log/{second}-000000.jsonl", entry.line())
    root.write("runs/a-0/plan.json", b"")  # as a full disk leaves it
    root.write("runs/a-5/plan.json", root.read("runs/a-2/plan.json"))  # without its recipe
    html = render_run(root, "a-4")[1]
    assert 'href="../a-2/report.html"' in html
    text = " ".join(Page(html).text.split())
    assert "branch, 8²99193" in text
    assert "steps: 1before steps: 3now" in text
    assert text.count("Warning. evaluation: a part was damaged") == 1
    assert "run before" not in render_run(root, "a-1")[1]


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


def test_the_age_of_the_checkpoint_counts_from_the_log_that_tells_of_one(recorder: RunRecorder):
    (status,) = recorder.snapshot()
    started = status.saved
    recorder.emit(events.Metrics("base", 1, {"loss": 1.0}))
    recorder.emit(events.Progress("base", 1, 9))
    assert status.saved == started == status.started
    recorder.emit(events.Metrics("base", 2, {"loss": 1.0, "checkpoint_hold_seconds": 1.5}))
    assert status.saved > started


def test_a_worker_goes_on_when_the_recorder_is_gone():
    def gone(event: events.Event) -> None:
        raise RayActorError

    ActorRecorder(SimpleNamespace(emit=SimpleNamespace(remote=gone))).emit(events.Progress("base", 1, 2))


def started(spool: Path) -> RunRecorder:
    """The run's recorder, as Ray starts it and starts it again."""
    return RunRecorder(spool=str(spool), journal="own", begun=events.RunStarted("r", "", {}, {"name": "tiny"}))


def die(recorder: RunRecorder) -> None:
    """The operating system closes the files of a killed process, and lets go of its locks."""
    assert recorder.log.journal is not None
    recorder.log.journal._events.close()
    recorder.log.journal._lock.release()


def test_a_recorder_that_died_is_followed_by_one_with_the_same_table_log_and_warnings(tmp_path: Path):
    first, place = started(tmp_path / "spool"), str(tmp_path / "base")
    first.emit(events.StageStarted("base", "k", {}, {}, place))
    first.emit(events.Metrics("base", 1, {"mfu": 0.25, "checkpoint_hold_seconds": 2.0}))
    first.emit(events.Metrics("base", 2, {"loss": 0.5}))
    first.emit(events.Warning("base", "little room"))
    first.emit(events.StageHeld("prior", "queued", "another driver has it"))
    first._store("base")
    before = first.snapshot()
    die(first)
    second = started(tmp_path / "spool")
    second.emit(events.Warning("base", "little room"))  # Ray sends again what was not answered
    second.emit(events.Metrics("base", 2, {"loss": 0.5}))
    second.emit(events.Metrics("base", 3, {"loss": 0.4, "checkpoint_hold_seconds": 1.0}))
    second.emit(events.StageEnded("base", "FINISHED"))
    stage, waiting = second.snapshot()
    assert waiting.note == before[1].note
    assert (stage.started, stage.warnings) == (pytest.approx(before[0].started, abs=0.01), ("little room",))
    assert stage.measures == {"mfu": 0.25, "checkpoint_hold_seconds": 3.0}
    assert {step: point["loss"] for step, point in stage_points(Store(place)).items() if step > 1} == {2: 0.5, 3: 0.4}
    said = second.close("FINISHED").warnings
    assert said[0] == "base: little room"
    assert said[1].startswith("the run's recorder died")
    assert len(said) == 2
    assert not (tmp_path / "spool" / "own").exists(), "without MLflow nobody reads it again"


def test_the_journal_of_a_killed_driver_is_not_kept_where_there_is_no_mlflow(tmp_path: Path):
    killed = RunRecorder(spool=str(tmp_path), journal="killed")
    die(killed)
    started(tmp_path)
    assert [folder.name for folder in tmp_path.iterdir()] == ["own"]


def test_a_full_disk_under_the_journal_fails_no_event_and_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A limit of the size of files does the same as a full disk: a part of a line is written, then nothing."""
    recorder, (soft, hard) = started(tmp_path / "spool"), resource.getrlimit(resource.RLIMIT_FSIZE)
    recorder.tracker = SimpleNamespace(close=lambda *_, **__: [], delivery=None, undelivered="", unregistered=[])
    recorder.emit(events.StageStarted("base", "k", {}, {}))
    full = (tmp_path / "spool" / "own" / "events.jsonl").stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (full + 20, hard))
    try:
        for step in range(3):
            recorder.emit(events.Metrics("base", step, {"loss": 1.0}))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    recorder.emit(events.Metrics("base", 3, {"loss": 1.0}))
    assert [event.step for event in written(recorder) if isinstance(event, events.Metrics)] == [3]
    (now,) = recorder.snapshot()[0].warnings
    assert now.startswith("no room for the journal (")
    closing = recorder.close("FINISHED")
    (line,) = closing.warnings
    assert closing.lost == 3
    assert line.startswith("MLflow lacks 3 records of this run, for which its journal had no room (")
    assert "run the same command again" in line


def test_a_full_disk_costs_a_run_without_mlflow_nothing(tmp_path: Path) -> None:
    recorder = RunRecorder(tracking=None, spool=str(tmp_path / "spool"), journal="own")
    recorder.log.problem = "No space left on device"
    assert recorder.close("FINISHED").undelivered == ""


def test_a_run_without_room_for_a_journal_goes_on_and_says_that_mlflow_gets_nothing(tmp_path: Path):
    (tmp_path / "spool").write_text("a file where a folder should be")
    recorder = RunRecorder(tracking="http://127.0.0.1:9", spool=str(tmp_path / "spool"), journal="own")
    recorder.emit(events.StageStarted("base", "k", {}, {}))
    assert [status.state for status in recorder.snapshot()] == ["running"]
    assert recorder.close("FINISHED").warnings[0].startswith("MLflow gets nothing of this run")


def warn_twice(recorder: RunRecorder, display: Display) -> None:
    """Progress follows each warning before anything is shown, as where steps are fast."""
    for line in ("room for 1 of 2 workers", "room for 2 of 2 workers"):
        recorder.emit(events.Warning("base", line))
        recorder.emit(events.Progress("base", 1, 2))
        display(recorder.snapshot())
        display(recorder.snapshot())


def test_a_log_has_a_line_for_each_warning_though_progress_followed_it(
    recorder: RunRecorder, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO, logger="cascade")
    warn_twice(recorder, Display(Console(file=io.StringIO())))
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert said == ["base: room for 1 of 2 workers", "base: room for 2 of 2 workers"]


def test_a_log_has_a_line_at_each_change_of_a_state_and_none_for_every_look(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, logger="cascade")
    with Display(Console(file=io.StringIO())) as show:
        for state in ("queued", "running", "running", "running", "done"):
            show([StageStatus("base", state=state)])
    assert [record.getMessage().split()[1] for record in caplog.records] == ["queued", "running", "done"]


def test_a_terminal_has_each_warning_once_above_the_table(recorder: RunRecorder):
    out = io.StringIO()
    display = Display(Console(file=out, force_terminal=True, width=100))
    with display:
        warn_twice(recorder, display)
    assert out.getvalue().count("base: room for 1 of 2 workers") == 1
    assert display.live is not None
    assert not display.live.is_started, "the terminal is given back"
    assert recorder.close("FINISHED").warnings == ["base: room for 1 of 2 workers", "base: room for 2 of 2 workers"]


@pytest.mark.parametrize(
    ("free", "resources", "note"),
    [
        (0.5, Resources(num_workers=2), r"^waits for 2 x 1 CPU \(free 0.5 of 2\)$"),
        (2, Resources(num_workers=2), "the machine is busy$"),
        (2, Resources(num_workers=2, min_workers=1), "or Ray keeps the room of a killed run"),
        # Four GPUs are free, but eight workers start together or not at all.
        (
            8,
            Resources(num_workers=8, cpus_per_worker=0.25, gpus_per_worker=1),
            r"^waits for 8 x 1 GPU \(free 4 of 4\)$",
        ),
        (8, Resources(num_workers=8, cpus_per_worker=0.25, gpus_per_worker=1, min_workers=4), "^starting slowly"),
    ],
)
def test_a_stage_without_a_first_step_says_what_it_waits_for(
    free: float, resources: Resources, note: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "available_resources", lambda: {"CPU": free, "GPU": 4})
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2, "GPU": 4})
    status = StageStatus("base", state="running", started=0.0, finished=WAIT_WARNING_SECONDS + 1)
    assert re.search(note, _starved(status, resources))
    status.note = "store s3://bucket away for 2:10"
    assert _starved(status, resources) == ""
    status.note = ""
    status.step = 1
    assert _starved(status, resources) == ""


LARGE = {  # what a training on many GPUs makes of them
    "samples_per_second": 12345.6,
    "samples_per_second_per_gpu": 1543.2,
    "mfu": 0.412,
    "achieved_gflops": 1234567.8,
    "gpu_utilization": 1.0,
    "data_wait_fraction": 1.0,
    "peak_memory_gb": 139.4,
    "checkpoint_hold_seconds": 12345.6,
}


def shown(*statuses: StageStatus) -> list[str]:
    console = Console(file=io.StringIO(), width=100)
    console.print(run_tables([*statuses]))
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def training(**measures: float) -> StageStatus:
    figures = {"step": 123456, "total": 1980000, "rate": 12.34, "loss": 0.1234}
    return StageStatus("upsampler_256", "running", **figures, started=0.0, finished=360000.0, measures=measures)


def test_what_a_training_makes_of_the_machine_fits_100_columns_whole_and_in_one_line():
    assert LARGE.keys() == MEASURES.keys()
    head, first, _, titles, second = shown(training(**LARGE))
    assert first.split() == [
        *("upsampler_256", "running", "╸", "123456/1980000", "12.3", "steps/s"),
        *("41:47:29", "100:00:00", "0.1234"),
    ]
    assert all(measure.title in titles and measure.text(LARGE[name]) in second for name, measure in MEASURES.items())
    assert "…" not in head + first + titles + second


def test_no_column_is_shown_that_no_training_fills():
    *_, titles, _ = shown(training(samples_per_second=2.0, data_wait_fraction=0.03))
    assert titles.split() == ["training", "samples/s", "data", "wait"]
    assert len(shown(training())) == 2  # nothing but the stages


def test_a_log_line_says_how_fast_and_what_waits():
    line = status_line(training(**LARGE))
    assert line.endswith("samples/s 12,346, MFU 41 %, GFLOP/s 1,234,568, data wait 100 %")


def test_the_pace_is_that_of_what_is_done_and_not_of_what_was_found() -> None:
    pace = Pace()
    assert [pace.rate(64 * count, now=10 + 0.001 * count) for count in range(1, 9)] == [None] * 8
    assert pace.rate(576, now=20.008) == pytest.approx(6.4)
    assert pace.rate(640, now=30.008) == pytest.approx(6.4)


def test_other_work_begins_with_a_pace_of_its_own() -> None:
    pace = Pace()
    for count in range(5):
        pace.rate(100 * count, now=count)
    assert pace.rate(10, now=10) is None
    assert pace.rate(20, now=11) == 10


def test_the_pace_follows_what_is_done_now() -> None:
    pace = Pace()
    for second in range(100):
        pace.rate(second, now=second)
    for second in range(100, 200):
        last = pace.rate(100 + 10 * (second - 100), now=second)
    assert last == pytest.approx(10)
