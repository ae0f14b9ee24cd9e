"""What runs next to a run, or against it: an MLflow server that is away, other drivers, clocks, a cloud's notice."""

import contextlib
import os
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest
from mlflow.tracking import MlflowClient

from components.runtime import events
from components.runtime.tracking.names import environment
from components.runtime.tracking.tracker import Tracker
from tests.conftest import free_port, mlflow_process
from tests.faults.cluster import TRAINER, nodes, processes
from tests.faults.conftest import Record, Undisturbed
from tests.faults.runs import INTERVAL, Run, clock, race, wait_until

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1500)]
PROVES = ("components/runtime/storage", "components/runtime/tracking", "pipelines/engine/execute.py")
POINTS = 600
STEPS, LONG = 160, 800


def test_a_server_killed_at_any_moment_loses_no_point_and_doubles_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record: Record
):
    for name, value in environment(timeout_s=10, retries=0).items():
        monkeypatch.setenv(name, value)
    port = free_port()
    uri = f"http://127.0.0.1:{port}"
    tracker = Tracker(uri, experiment="killed", spool=tmp_path / "spool", flush_seconds=0.1)
    tracker.emit(events.RunStarted("run", "", {}, {"name": "tiny"}))
    tracker.emit(events.StageStarted("base", "k1", {}, {}))

    def say() -> None:
        for step in range(POINTS):
            tracker.emit(events.Metrics("base", step, {"loss": float(step)}))
            time.sleep(0.02)

    speaker = threading.Thread(target=say)
    with mlflow_process(tmp_path, port) as (_, server):
        speaker.start()
        time.sleep(POINTS * 0.02 / 2)
        os.killpg(server.pid, signal.SIGKILL)
    with mlflow_process(tmp_path, port):
        speaker.join()
        tracker.emit(events.StageEnded("base", "FINISHED"))
        assert tracker.close("FINISHED") == []
        client = MlflowClient(uri)
        experiment = client.get_experiment_by_name("killed").experiment_id
        (run,) = client.search_runs([experiment], "tags.`cascade.stage` = 'base'")
        assert [point.step for point in client.get_metric_history(run.info.run_id, "loss")] == list(range(POINTS))
        assert run.info.status == "FINISHED"
    record("MLflow server killed while points flow", 1, f"{POINTS} of {POINTS} points, each once")


@pytest.mark.parametrize("clocks", [(0, 3600), (0, 3600, -3600, 86400)])
def test_drivers_that_race_do_each_stage_once_whatever_their_clocks(
    clocks: tuple[int, ...], tmp_path: Path, undisturbed: Undisturbed, record: Record
):
    run = Run(tmp_path / "run", steps=STEPS)
    race(run, [run.start(**clock(tmp_path, seconds)) for seconds in clocks])
    proof = f"one attempt, {run.same_as(undisturbed(STEPS))}"
    record(f"{len(clocks)} drivers race, their clocks apart by up to {max(clocks) // 3600} h", len(clocks), proof)
    record(f"kill -9 of the one of {len(clocks)} that works", 1, proof)


def test_a_driver_that_stood_still_gives_way_and_writes_nothing_more(
    tmp_path: Path, undisturbed: Undisturbed, record: Record
):
    """SIGSTOP of all its processes for longer than its lease lasts; they go on while another driver trains."""
    run = Run(tmp_path / "run", steps=LONG)
    stopped = run.start()
    wait_until(lambda: run.step() >= INTERVAL, run)
    family = [psutil.Process(stopped.pid), *psutil.Process(stopped.pid).children(recursive=True)]
    for process in family:
        process.suspend()
    reached, other = run.step(), run.start()
    wait_until(lambda: run.step() > reached, run)
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.resume()
    for driver in (stopped, other):
        run.finish(driver)
    words = " ".join(run.said().split())
    assert words.count("another took over") == 2, "said at once, and among the warnings of the end"
    assert "Traceback" not in words
    attempts = [name for name in run.stage("base").folders() if name.startswith("attempt-")]
    assert len(attempts) == 1, "two drivers finished the same stage"
    proof = f"one line, one attempt, {run.same_as(undisturbed(LONG))}"
    record(
        "a driver is stopped (SIGSTOP) for longer than its lease, and goes on beside the one that took over", 1, proof
    )


def test_a_node_that_is_announced_to_go_costs_no_step(tmp_path: Path, undisturbed: Undisturbed, record: Record):
    """Ray is told as a cloud tells it; training saves at the step where it hears it and goes on on another node."""
    run = Run(tmp_path, steps=LONG)
    with nodes(2) as cluster:
        driver = run.start(RAY_ADDRESS=cluster.address)
        wait_until(lambda: run.step() >= INTERVAL and cluster.working() is not None, run)
        node = cluster.working()
        cluster.drain(node, seconds=30)  # as Google and Azure give
        wait_until(lambda: not processes(node, TRAINER), run)
        saved = run.step()
        cluster.kill(node)
        run.finish(driver)
    assert saved < LONG, "the run ended before the notice came"
    assert f"a node is being taken away: saved at step {saved}, going on elsewhere" in " ".join(run.said().split())
    record("notice that a node goes", 1, f"saved at step {saved}, {run.same_as(undisturbed(LONG))}")
