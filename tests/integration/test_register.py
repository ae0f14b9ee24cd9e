"""MLflow away to the end of a run, its database locked, a record refused: what is missing is said, kept in storage, and
registered from there by `cascade register` on any machine, once."""

import io
import json
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import BAD_REQUEST
from PIL import Image

from components.runtime import events
from components.runtime.storage.artifact import Artifact
from components.runtime.storage.store import Store
from components.runtime.tracking import registry
from components.runtime.tracking.promotion import champion_of
from pipelines.engine.recorder import EXPERIMENT, Closing, RunRecorder
from tests.in_process import Done, in_process
from tests.tiny_cascade import commit_model
from tests.tiny_generators import lone
from tests.waiting import eventually

pytestmark = pytest.mark.usefixtures("short_requests")
NAME, RUN, AWAY, STEPS = "image-cascade-tiny", "tiny-abc", "http://127.0.0.1:9", 5
PLAN = {"saved": 1.0, "seconds": 2.0, "facts": {"recipe": "tiny"}, "code_changes": [], "stages": []}


@pytest.fixture(scope="module")
def cascade(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    home = tmp_path_factory.mktemp("cascade")
    return commit_model(home, "cascade", "k", lone("gan", home / "model"))


@pytest.fixture
def database(empty_database: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(empty_database, tmp_path / "mlflow.db"))


@pytest.fixture
def start(cascade: Artifact, tmp_path: Path) -> Callable[[str], RunRecorder]:
    """A run that has trained a stage and found its cascade."""
    Store(str(tmp_path / "runs")).write(f"runs/{RUN}/plan.json", json.dumps(PLAN).encode())

    def started(tracking: str) -> RunRecorder:
        tags = {"name": "tiny", "git_commit": "", "storage": str(tmp_path / "runs")}
        begun = events.RunStarted(RUN, "name: tiny\n", {}, tags)
        recorder = RunRecorder(tracking=tracking, spool=str(tmp_path / "spool"), journal="own", begun=begun)
        recorder.emit(events.StageStarted("base", "k1", {}, {}))
        for step in range(1, STEPS + 1):
            recorder.emit(events.Metrics("base", step, {"loss": 1 / step}))
        png = io.BytesIO()
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(png, "PNG")
        recorder.emit(events.Image("base", STEPS, "grid", png.getvalue()))
        recorder.emit(events.StageEnded("base", "FINISHED"))
        recorder.emit(events.StageCached("cascade", cascade))
        return recorder

    return started


def register(place: Path, tracking: str) -> Done:
    """In another folder, without the journal of the driver."""
    shutil.rmtree(place / "spool", ignore_errors=True)
    (place / "elsewhere").mkdir(exist_ok=True)
    command = ["register", RUN, "--storage", str(place / "runs"), "--tracking", tracking]
    return in_process(*command, cwd=place / "elsewhere")


def assert_all_is_there_once(tracking: str) -> None:
    client = MlflowClient(tracking)
    assert champion_of(client, NAME) == "1"
    assert len(client.search_model_versions(f"name = '{NAME}'")) == 1
    experiment = client.get_experiment_by_name(EXPERIMENT)
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    assert sorted(run.data.tags.get("cascade.stage", "") for run in runs) == ["", "base", "cascade"]
    assert {run.info.status for run in runs} == {"FINISHED"}
    (base,) = (run.info.run_id for run in runs if run.data.tags.get("cascade.stage") == "base")
    assert [point.step for point in client.get_metric_history(base, "loss")] == list(range(1, STEPS + 1))
    assert len([file for file in client.list_artifacts(base, "images") if file.path.endswith(".png")]) == 1


def waiting(place: Path) -> list[str]:
    return [info.path for info in Store(str(place / "runs")).list(f"runs/{RUN}/undelivered")]


def assert_said(closing: Closing, place: Path, why: str) -> None:
    assert why in closing.undelivered
    assert list(closing.unregistered) == [NAME]
    assert any("MLflow did not take everything" in line and f"{RUN}/undelivered" in line for line in closing.warnings)
    assert len(waiting(place)) >= 1


def test_a_run_that_ended_without_mlflow_is_registered_from_storage_by_any_machine_once(
    start: Callable[[str], RunRecorder], database: Path, tmp_path: Path
):
    assert_said(start(AWAY).close("FINISHED"), tmp_path, "")
    still = register(tmp_path, AWAY)
    assert still.returncode == 3
    assert f"{RUN}: MLflow still lacks a part" in still.stdout
    assert len(waiting(tmp_path)) >= 1
    done = register(tmp_path, uri := f"sqlite:///{database}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"model: models:/{NAME}@champion (version 1: the first of its name)" in done.stdout
    assert_all_is_there_once(uri)
    assert waiting(tmp_path) == []
    again = register(tmp_path, uri)
    assert (again.returncode, again.stdout) == (0, f"{RUN}: MLflow has everything\n")
    assert_all_is_there_once(uri)


def test_no_mlflow_to_register_at_and_no_such_run_are_one_line(tmp_path: Path, start: Callable[[str], RunRecorder]):
    unsent = f"nothing of {RUN} waits in storage, and sqlite:///{tmp_path}/new.db has no run of that name"
    for command, why in (
        (["nobody"], "no run 'nobody'"),
        ([RUN, "--tracking", "none"], f"{RUN}: name the MLflow"),
        ([RUN, "--tracking", f"sqlite:///{tmp_path}/new.db"], unsent),
        ([RUN, "--tracking", AWAY], f"{AWAY} can't be asked for {RUN}"),
    ):
        done = in_process("register", *command, "--storage", str(tmp_path / "runs"), cwd=tmp_path)
        assert done.returncode == 2
        assert why in done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_what_mlflow_refuses_reaches_the_user_and_is_registered_when_it_does_no_longer(
    start: Callable[[str], RunRecorder], database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    uri, accepted = f"sqlite:///{database}", registry.register_version

    def refuse(*arguments: object, **options: object) -> None:
        raise MlflowException("model names hold no spaces", error_code=BAD_REQUEST)

    monkeypatch.setattr(registry, "register_version", refuse)
    closing = start(uri).close("FINISHED")
    assert_said(closing, tmp_path, "model names hold no spaces")
    assert closing.warnings[0] == "MLflow refused StageCached of cascade, 1 x: model names hold no spaces"
    assert register(tmp_path, uri).returncode == 3
    monkeypatch.setattr(registry, "register_version", accepted)
    done = register(tmp_path, uri)
    assert done.returncode == 0, done.stdout
    assert f"model: models:/{NAME}@champion" in done.stdout
    assert_all_is_there_once(uri)


@pytest.mark.parametrize("to_the_end", [False, True])
def test_a_locked_database_is_an_mlflow_that_is_away(
    start: Callable[[str], RunRecorder], database: Path, tmp_path: Path, to_the_end: bool
):
    uri, locked = f"sqlite:///{database}", sqlite3.connect(database, check_same_thread=False, isolation_level=None)
    locked.execute("BEGIN EXCLUSIVE")
    recorder = start(uri)
    assert recorder.tracker is not None
    assert eventually(lambda: recorder.tracker._away, 60)
    if not to_the_end:
        locked.rollback()
    closing = recorder.close("FINISHED")
    if to_the_end:
        assert_said(closing, tmp_path, "database is locked")
        locked.rollback()
        assert register(tmp_path, uri).returncode == 0
    else:
        assert closing.undelivered == ""
    locked.close()
    assert_all_is_there_once(uri)
