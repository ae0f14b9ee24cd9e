"""A driver's machine is lost with the journal for MLflow: the stage's log in storage makes up for it, and points that
are in neither are named."""

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow.entities import Metric, Run
from mlflow.tracking import MlflowClient

from components.configuration.optimization import OptimizationConfig
from components.runtime import events
from components.runtime.storage.artifact import Artifact
from components.runtime.storage.store import Store
from components.runtime.tracking.event_log import stage_points
from pipelines.engine import recorder
from pipelines.engine.recorder import EXPERIMENT, RunRecorder
from tests.waiting import eventually

TOTAL, LOST, FIRST = 30, 20, 5  # steps of the training, of the driver that is lost, and of its first second
OPTIMIZATION = OptimizationConfig(
    total_steps=TOTAL, global_batch_size=8, learning_rate=1e-3, warmup_steps=0, log_every=1, sample_every=10
)
CONFIG = {"optimization": OPTIMIZATION.model_dump()}


@pytest.fixture(autouse=True)
def _stored_at_once(short_requests: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "STORE_SECONDS", 0.0)


@pytest.fixture
def run(tmp_path: Path) -> str:
    return f"lost-{time.time_ns()}"


@pytest.fixture
def start(mlflow_server: str, tmp_path: Path, run: str) -> Callable[..., RunRecorder]:
    def started(machine: str) -> RunRecorder:
        return start_recorder(tmp_path, machine, mlflow_server, run)

    return started


def start_recorder(place: Path, machine: str, tracking: str, run: str) -> RunRecorder:
    """The recorder of a driver on `machine`, whose disk the spool is on; storage is common."""
    made = RunRecorder(tracking=tracking, spool=str(place / machine))
    made.emit(events.RunStarted(run, "", {}, {"name": "tiny", "git_commit": ""}))
    return made


def stage_folder(place: Path) -> str:
    return str(place / "storage" / "base")


def log(recorder: RunRecorder, first: int, last: int) -> None:
    for step in range(first, last + 1):
        recorder.emit(events.Metrics("base", step, {"loss": 1 / step, "rate": 5.0}))
        recorder.emit(events.Progress("base", step, TOTAL))


def lose_a_driver(place: Path, tracking: str, run: str, *, steps: int, kept: int, mlflow: str = "there") -> None:
    """A driver trains so many steps, of which `kept` are in storage, and is gone with its machine when MLflow has the
    first of them: afterwards its thread sends nothing, even one that was sending then."""
    address = tracking if mlflow == "there" else "http://127.0.0.1:9"
    program = f"""
        import os, signal, threading
        from pathlib import Path
        from components.runtime.events import StageStarted
        from pipelines.engine import recorder
        from components.runtime.tracking.tracker import Tracker
        from tests.integration.test_lost_journal import FIRST, log, stage_folder, start_recorder, wait_for_first
        gate, send = threading.Lock(), Tracker._send
        def send_in_turn(tracker):
            with gate:
                send(tracker)
        Tracker._send = send_in_turn
        recorder.STORE_SECONDS = 0.0
        lost = start_recorder(Path("{place}"), "lost", "{address}", "{run}")
        lost.emit(StageStarted("base", "{run}", {{}}, {{}}, stage_folder(Path("{place}"))))
        log(lost, 1, FIRST)
        if "{mlflow}" == "there":
            wait_for_first("{address}", "{run}")
            gate.acquire()  # no sending is under way, and none begins
        log(lost, FIRST + 1, {kept})
        lost.log.store = lambda stage, older_than=0.0: None
        log(lost, {kept + 1}, {steps})
        os.kill(os.getpid(), signal.SIGKILL)
    """
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], env=os.environ, check=False)
    assert killed.returncode == -signal.SIGKILL
    shutil.rmtree(place / "lost")


def artifact(run: str, place: Path) -> Artifact:
    provenance = {"run": run, "config": CONFIG}
    return Artifact(kind="report", stage="base", key=run, files=(), provenance=provenance, root=stage_folder(place))


def history(tracking: str, run: str) -> tuple[Run, list[Metric]]:
    """The one child run, and the points of its loss in the order in which they came."""
    client = MlflowClient(tracking)
    experiment = client.get_experiment_by_name(EXPERIMENT)
    assert experiment is not None
    wanted = f"tags.`cascade.run` = '{run}' and tags.`cascade.stage` = 'base'"
    (child,) = client.search_runs([experiment.experiment_id], wanted)
    return child, client.get_metric_history(child.info.run_id, "loss")


def wait_for_first(tracking: str, run: str) -> None:
    """Until MLflow has what a driver sent at once."""

    def is_there() -> bool:
        try:
            return steps(history(tracking, run)[1]) == list(range(1, FIRST + 1))
        except (AssertionError, ValueError):  # no experiment or no run yet
            return False

    assert eventually(is_there, 60, pause=0.2)


def steps(points: list[Metric]) -> list[int]:
    return sorted(point.step for point in points)


def test_what_storage_has_is_sent_again_and_what_mlflow_had_stays(
    start: Callable, mlflow_server: str, run: str, tmp_path: Path
):
    lose_a_driver(tmp_path, mlflow_server, run, steps=LOST, kept=LOST)
    _, acknowledged = history(mlflow_server, run)
    assert steps(acknowledged) == list(range(1, FIRST + 1)), "the rest was in the journal"
    found = start("new")
    found.emit(events.StageStarted("base", run, {}, {}, stage_folder(tmp_path)))
    log(found, 16, TOTAL)  # from the checkpoint of step 15
    found.emit(events.StageEnded("base", "FINISHED", artifact(run, tmp_path)))
    assert found.close("FINISHED").warnings == []
    child, points = history(mlflow_server, run)
    assert steps(points) == list(range(1, TOTAL + 1))
    kept = {(point.step, point.value, point.timestamp) for point in points}
    assert kept >= {(point.step, point.value, point.timestamp) for point in acknowledged}
    assert child.info.status == "FINISHED"


def test_what_is_in_neither_is_said(start: Callable, mlflow_server: str, run: str, tmp_path: Path):
    lose_a_driver(tmp_path, mlflow_server, run, steps=LOST, kept=12)
    found = start("new")
    found.emit(events.StageStarted("base", run, {}, {}, stage_folder(tmp_path)))
    log(found, 16, TOTAL)
    found.emit(events.StageEnded("base", "FINISHED", artifact(run, tmp_path)))
    (warning,) = found.close("FINISHED").warnings
    assert warning.startswith("base: MLflow lacks points of 3 steps from 13 to 15: ")
    _, points = history(mlflow_server, run)
    assert steps(points) == [*range(1, 13), *range(16, TOTAL + 1)]


@pytest.mark.parametrize("mlflow", ["there", "away"])
def test_the_points_of_a_stage_that_is_cached_since_are_sent_too(
    start: Callable, mlflow_server: str, run: str, tmp_path: Path, mlflow: str
):
    lose_a_driver(tmp_path, mlflow_server, run, steps=TOTAL, kept=TOTAL, mlflow=mlflow)
    found = start("new")
    found.emit(events.StageCached("base", artifact(run, tmp_path)))
    assert found.close("FINISHED").warnings == []
    child, points = history(mlflow_server, run)
    assert steps(points) == list(range(1, TOTAL + 1))
    assert (child.info.status, child.data.tags["cascade.cached"]) == ("FINISHED", "false")
    assert mlflow == "there" or child.data.params["optimization.total_steps"] == str(TOTAL)


def test_a_point_that_a_driver_sends_late_is_not_doubled(start: Callable, mlflow_server: str, run: str, tmp_path: Path):
    """Not lost after all: another driver finds the stage finished before the one that trained has sent its last."""
    late = start("late")
    late.emit(events.StageStarted("base", run, {}, {}, stage_folder(tmp_path)))
    log(late, 1, FIRST)
    wait_for_first(mlflow_server, run)
    log(late, FIRST + 1, TOTAL)
    found = start("new")
    found.emit(events.StageCached("base", artifact(run, tmp_path)))
    assert found.close("FINISHED").warnings == []
    late.emit(events.StageEnded("base", "FINISHED", artifact(run, tmp_path)))
    assert late.close("FINISHED").warnings == []
    _, points = history(mlflow_server, run)
    assert steps(points) == list(range(1, TOTAL + 1))


def test_the_log_is_whole_in_storage_before_its_stage_can_be_found_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(recorder, "STORE_SECONDS", 1e9)
    training = RunRecorder()
    training.emit(events.StageStarted("base", "k", {}, {}, stage_folder(tmp_path)))
    log(training, 1, TOTAL)
    assert list(stage_points(Store(stage_folder(tmp_path)))) == list(range(1, TOTAL + 1))
