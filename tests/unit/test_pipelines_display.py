"""What the user sees while stages run: each warning once, when it comes, on a terminal and in a log."""

import io
import logging
import re

import pytest
import ray
from rich.console import Console

from components.runtime import events
from components.runtime.events import MEASURES
from components.runtime.execution import Resources
from pipelines.engine.display import Display, run_tables, status_line
from pipelines.engine.execute import WAIT_WARNING_SECONDS, _starved
from pipelines.engine.recorder import RunRecorder, StageStatus


@pytest.fixture
def recorder() -> RunRecorder:
    recorder = RunRecorder()
    recorder.emit(events.StagePlanned("base", "0123"))
    recorder.emit(events.StageStarted("base", "0123", {}, {}))
    return recorder


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


def test_a_terminal_has_each_warning_once_above_the_table(recorder: RunRecorder):
    out = io.StringIO()
    display = Display(Console(file=out, force_terminal=True, width=100))
    with display:
        warn_twice(recorder, display)
    assert out.getvalue().count("base: room for 1 of 2 workers") == 1
    assert recorder.close("FINISHED") == ["base: room for 1 of 2 workers", "base: room for 2 of 2 workers"]


@pytest.mark.parametrize(
    ("free", "min_workers", "note"),
    [
        (0.5, None, r"waits for 2 x 1 CPU \(free 0.5 of 2\)"),
        (2, None, "the machine is busy$"),
        (2, 1, "or Ray keeps the room of a killed run"),
    ],
)
def test_a_stage_without_a_first_step_says_what_it_waits_for(
    free: float, min_workers: int | None, note: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "available_resources", lambda: {"CPU": free})
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2})
    resources = Resources(num_workers=2, min_workers=min_workers)
    status = StageStatus("base", "0123", state="running", started=0.0, finished=WAIT_WARNING_SECONDS + 1)
    assert re.search(note, _starved(status, resources))
    status.step = 1
    assert _starved(status, resources) == ""


def test_a_gang_that_the_cluster_can_not_hold_says_what_it_waits_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four GPUs are free, but eight workers start together or not at all."""
    for asked in ("available_resources", "cluster_resources"):
        monkeypatch.setattr(ray, asked, lambda: {"CPU": 32, "GPU": 4})
    status = StageStatus("base", "0123", state="running", started=0.0, finished=WAIT_WARNING_SECONDS + 1)
    asking = Resources(num_workers=8, gpus_per_worker=1)
    assert _starved(status, asking) == "waits for 8 x 1 GPU (free 4 of 4)"
    assert "GPU" not in _starved(status, asking.model_copy(update={"min_workers": 4}))


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
    return StageStatus("upsampler_256", "k", "running", **figures, started=0.0, finished=360000.0, measures=measures)


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
