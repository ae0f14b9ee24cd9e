"""Laws of tracking, with a real MLflow server: no point lost, none doubled, every run honest about how it ended."""

import json
import logging
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import BAD_REQUEST
from mlflow.tracking import MlflowClient
from PIL import Image

from components.runtime import events
from components.runtime.storage.artifact import Artifact, FileEntry
from components.runtime.tracking.tracker import Tracker
from tests.outages import Gate, gate
from tests.waiting import eventually

pytestmark = pytest.mark.usefixtures("short_requests")
SHUT = 3600.0  # seconds, unless it is opened before


@pytest.fixture
def experiment() -> str:
    return f"test-{time.time_ns()}"


@pytest.fixture
def track(mlflow_server: str, experiment: str, tmp_path: Path) -> Callable[..., Tracker]:
    def start(run: str = "first", uri: str = mlflow_server) -> Tracker:
        tracker = Tracker(uri, experiment=experiment, spool=tmp_path / "spool", flush_seconds=0.3)
        parameters = {"name": "tiny", "base": {"total_steps": 30, "betas": [0.9, 0.99]}}
        tags = {"name": "tiny", "git_commit": "abc123"}
        tracker.emit(events.RunStarted(run, "name: tiny\n", parameters, tags))
        return tracker

    return start


class Seen:
    """What MLflow says about an experiment."""

    def __init__(self, uri: str, experiment: str) -> None:
        self.client = MlflowClient(uri)
        self.experiment_id = self.client.get_experiment_by_name(experiment).experiment_id

    def runs(self, *, stage: str | None = None) -> list[Run]:
        wanted = f"tags.`cascade.stage` = '{stage}'" if stage else "tags.`cascade.stage_key` = 'workflow'"
        return list(self.client.search_runs([self.experiment_id], wanted))

    def run(self, *, stage: str | None = None) -> Run:
        (run,) = self.runs(stage=stage)
        return run

    def steps(self, name: str, *, stage: str) -> list[int]:
        return [point.step for point in self.client.get_metric_history(self.run(stage=stage).info.run_id, name)]


@pytest.fixture
def seen(mlflow_server: str, experiment: str) -> Callable[[], Seen]:
    return lambda: Seen(mlflow_server, experiment)


def losses(seen: Callable[[], Seen]) -> list[int]:
    """Steps of the base's loss; none before MLflow has a run of it."""
    with suppress(AttributeError, ValueError):
        return seen().steps("loss", stage="base")
    return []


def artifact(stage: str, key: str) -> Artifact:
    entry = FileEntry(path="index.json", bytes=12, sha256="0" * 64)
    return Artifact(
        kind="shards",
        stage=stage,
        key=key,
        files=(entry,),
        metadata={"samples": 7},
        root=f"s3://bucket/stages/{stage}/{key}",
    )


def test_a_run_shows_its_parameters_curves_images_data_and_machine(track: Callable, seen: Callable, tmp_path: Path):
    tracker = track()
    images = artifact("images", "k1")
    tracker.emit(events.StageStarted("base", "k2", {"total_steps": 30}, {"images": images}))
    for step in range(30):
        tracker.emit(events.Metrics("base", step, {"train/loss": 1 / (step + 1), "train/rate": 5.0}))
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "grid.png")
    tracker.emit(events.Image("base", 30, "samples/grid", (tmp_path / "grid.png").read_bytes()))
    tracker.emit(events.Text("base", "notes.md", "all well"))
    time.sleep(2)
    tracker.emit(events.StageEnded("base", "FINISHED", artifact("base", "k2")))
    assert tracker.close("FINISHED") == []
    said = seen()
    parent, child = said.run(), said.run(stage="base")
    assert parent.data.params["base.betas"] == "[0.9, 0.99]"
    assert parent.data.tags["mlflow.source.git.commit"] == "abc123"
    assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert child.data.params["total_steps"] == "30"
    assert said.steps("train/loss", stage="base") == list(range(30))
    assert (parent.info.status, child.info.status) == ("FINISHED", "FINISHED")
    assert "system/cpu_utilization_percentage" in parent.data.metrics.keys() & child.data.metrics.keys()
    (dataset,) = child.inputs.dataset_inputs
    assert (dataset.dataset.name, dataset.dataset.digest) == ("images", "k1")
    assert json.loads(dataset.dataset.source) == {"uri": images.root}
    files = [file.path for file in said.client.list_artifacts(child.info.run_id)]
    assert "notes.md" in files
    stored = [file.path for file in said.client.list_artifacts(child.info.run_id, "images")]
    assert len(stored) == 2, "an image and its thumbnail"
    assert all(name.startswith("images/samples~grid+step+30+timestamp+") for name in stored)
    assert not list((tmp_path / "spool").iterdir()), "what has arrived leaves nothing behind"


def test_a_retry_goes_on_in_the_same_child_run_and_draws_no_step_twice(track: Callable, seen: Callable):
    tracker = track()
    tracker.emit(events.StageStarted("prior", "k1", {"a": 1}, {}))
    for step in range(20):
        tracker.emit(events.Metrics("prior", step, {"loss": float(step)}))
    tracker.emit(events.StageEnded("prior", "FAILED", error="worker died"))
    tracker.close("FAILED")
    assert seen().run(stage="prior").info.status == "FAILED"
    assert seen().run(stage="prior").data.tags["cascade.error"] == "worker died"
    tracker = track()  # the same workflow run again, from the checkpoint of step 10
    tracker.emit(events.StageStarted("prior", "k1", {"a": 1}, {}))
    for step in range(10, 30):
        tracker.emit(events.Metrics("prior", step, {"loss": float(step)}))
    tracker.emit(events.StageEnded("prior", "FINISHED"))
    tracker.close("FINISHED")
    assert len(seen().runs()) == 1
    assert seen().steps("loss", stage="prior") == list(range(30))
    assert seen().run(stage="prior").info.status == "FINISHED"


def test_a_cached_stage_links_to_the_run_that_made_it(track: Callable, seen: Callable):
    tracker = track("maker")
    tracker.emit(events.StageStarted("images", "k1", {}, {}))
    tracker.emit(events.StageEnded("images", "FINISHED", artifact("images", "k1")))
    tracker.close("FINISHED")
    maker = seen().run(stage="images")
    tracker = track("user")
    tracker.emit(events.StageCached("images", artifact("images", "k1")))
    tracker.close("FINISHED")
    tracker = track("maker")  # and again in the run that made it: nothing changes
    tracker.emit(events.StageCached("images", artifact("images", "k1")))
    tracker.close("FINISHED")
    said = seen()
    (cached,) = [run for run in said.runs(stage="images") if run.info.run_id != maker.info.run_id]
    assert cached.data.tags["cascade.cached"] == "true"
    assert cached.data.tags["cascade.made_by"] == maker.info.run_id
    assert f"/runs/{maker.info.run_id})" in cached.data.tags["mlflow.note.content"]
    again = said.client.get_run(maker.info.run_id)
    assert again.data.tags["cascade.cached"] == "false"
    assert (again.info.status, again.info.end_time) == ("FINISHED", maker.info.end_time)


@pytest.fixture
def network(mlflow_server: str) -> Iterator[Gate]:
    """A way to the MLflow server; while it is shut a connection is refused, as by a server that is gone."""
    with gate(mlflow_server) as made:
        yield made


def test_an_mlflow_that_is_away_loses_no_point_and_doubles_none(
    track: Callable, network: Gate, seen: Callable, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """Away at the start, in the middle and at the end; the next run delivers what was left."""
    network.close_for(SHUT, "refuses")
    tracker = track(uri=network.address)
    tracker.emit(events.StageStarted("base", "k1", {}, {}))
    with caplog.at_level(logging.WARNING):
        for first in (0, 10):
            for step in range(first, first + 10):
                tracker.emit(events.Metrics("base", step, {"loss": float(step)}))
                time.sleep(0.1)
            assert eventually(lambda count=first // 10 + 1: len(_said(caplog, "MLflow is away")) == count, 60)
            network.reopen()
            assert eventually(lambda last=first + 9: last in losses(seen), 60, pause=0.3)
            assert eventually(lambda count=first // 10 + 1: len(_said(caplog, "MLflow is back")) == count, 60)
            network.close_for(SHUT, "refuses")
        for step in range(20, 30):
            tracker.emit(events.Metrics("base", step, {"loss": float(step)}))
        tracker.emit(events.StageEnded("base", "FINISHED"))
        started = time.monotonic()
        (warning,) = tracker.close("FINISHED")
    assert time.monotonic() - started < 30, "an MLflow that is away is not waited for"
    assert "sent by the next run" in warning
    assert len(_said(caplog, "MLflow is away")) == 3, "said once each time that it goes"
    network.reopen()
    assert track("second", uri=network.address).close("FINISHED") == []
    assert seen().steps("loss", stage="base") == list(range(30))
    assert seen().run(stage="base").info.status == "FINISHED"
    assert [run.info.status for run in seen().runs()] == ["FINISHED", "FINISHED"]
    assert not list((tmp_path / "spool").iterdir())


def _said(caplog: pytest.LogCaptureFixture, text: str) -> list[str]:
    return [record.getMessage() for record in caplog.records if text in record.getMessage()]


def test_a_killed_process_is_shown_as_killed_by_the_next_and_all_of_it_arrives(
    mlflow_server: str, experiment: str, seen: Callable, track: Callable, tmp_path: Path
):
    program = f"""
        import os, signal, time
        from pathlib import Path
        from components.runtime import events
        from components.runtime.tracking.tracker import Tracker
        spool = Path("{tmp_path}/spool")
        tracker = Tracker("{mlflow_server}", experiment="{experiment}", spool=spool, flush_seconds=0.3)
        tracker.emit(events.RunStarted("killed", "", {{}}, {{"name": "tiny"}}))
        tracker.emit(events.StageStarted("base", "k1", {{}}, {{}}))
        tracker.emit(events.Metrics("base", 1, {{"loss": 1.0}}))
        while not Path("{tmp_path}/arrived").exists():
            time.sleep(0.01)
        tracker.emit(events.Metrics("base", 2, {{"loss": 0.5}}))
        tracker.emit(events.Image("base", 2, "samples/grid", Path("{tmp_path}/grid.png").read_bytes()))
        tracker.emit(events.Text("base", "notes.md", "all well"))
        os.kill(os.getpid(), signal.SIGKILL)
    """
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "grid.png")
    killed = subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)])
    assert eventually(lambda: losses(seen) == [1], 60, pause=0.3)
    (tmp_path / "arrived").touch()
    assert killed.wait(60) == -signal.SIGKILL
    assert seen().run(stage="base").info.status == "RUNNING"
    track("next").close("FINISHED")
    assert seen().steps("loss", stage="base") == [1, 2]
    assert seen().run(stage="base").info.status == "KILLED"
    files = seen().client.list_artifacts(seen().run(stage="base").info.run_id)
    assert {file.path for file in files} == {"notes.md", "images"}
    assert sorted(run.info.status for run in seen().runs()) == ["FINISHED", "KILLED"]


def test_what_mlflow_refuses_for_good_does_not_hold_up_the_rest(track: Callable, seen: Callable, tmp_path: Path):
    tracker = track()
    tracker.emit(events.StageStarted("base", "k1", {}, {}))
    tracker.emit(events.Image("base", 1, "no/image", b"not an image"))
    tracker.emit(events.Metrics("base", 1, {"loss": 1.0}))
    tracker.emit(events.StageEnded("base", "FINISHED"))
    tracker.emit(events.StageEnded("prior", "FAILED", error="it never began"))
    tracker.close("FINISHED")
    assert seen().run().info.status == "FINISHED"
    assert seen().steps("loss", stage="base") == [1]
    (kept,) = (tmp_path / "spool").glob("*/rejected.jsonl")
    assert json.loads(kept.read_text())["record"]["fields"]["name"] == "no/image"


def test_two_trackers_of_one_run_share_its_runs(track: Callable, seen: Callable):
    """Two drivers started at once on one storage."""
    trackers = [track(), track()]
    for tracker in trackers:
        tracker.emit(events.StageStarted("base", "k1", {}, {}))
    for tracker in trackers:
        tracker.emit(events.StageEnded("base", "FINISHED"))
    for tracker in trackers:
        tracker.close("FINISHED")
    assert len(seen().runs()) == 1
    assert len(seen().runs(stage="base")) == 1


def test_a_row_that_another_driver_writes_in_the_same_moment_is_no_refusal(
    track: Callable, seen: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A database takes the first of two equal rows alone, and the second driver finds it there."""
    end, ended = MlflowClient.set_terminated, list[str]()

    def end_as_second(client: MlflowClient, run_id: str, *arguments: object, **options: object) -> None:
        end(client, run_id, *arguments, **options)
        ended.append(run_id)
        if ended.count(run_id) == 1:
            raise MlflowException("(sqlite3.IntegrityError) UNIQUE constraint failed: inputs.source_id", BAD_REQUEST)

    monkeypatch.setattr(MlflowClient, "set_terminated", end_as_second)
    tracker = track()
    tracker.emit(events.StageStarted("base", "k1", {}, {}))
    tracker.emit(events.StageEnded("base", "FINISHED"))
    assert tracker.close("FINISHED") == []
    assert [ended.count(run_id) for run_id in dict.fromkeys(ended)] == [2, 2]
    assert seen().run().info.status == seen().run(stage="base").info.status == "FINISHED"
    assert not [*(tmp_path / "spool").glob("*/rejected.jsonl")]
