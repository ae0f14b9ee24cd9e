"""An MLflow server that is killed while points flow in, and started again on the same database."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from components.tracking.environment import environment
from components.tracking.tracker import Tracker
from tests.conftest import free_port, wait_for

POINTS = 600


def start_server(folder: Path, port: int) -> subprocess.Popen:
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += [
        "--backend-store-uri",
        f"sqlite:///{folder}/mlflow.db",
        "--artifacts-destination",
        str(folder / "files"),
    ]
    variables = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with open(folder / "server.log", "a") as log:
        process = subprocess.Popen(command, cwd=folder, env=variables, stdout=log, stderr=log, start_new_session=True)
    wait_for(f"http://127.0.0.1:{port}/health", process)
    return process


@pytest.mark.faults
def test_a_server_killed_at_any_moment_loses_no_point_and_doubles_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name, value in environment(timeout_s=10, retries=0).items():
        monkeypatch.setenv(name, value)
    port = free_port()
    server = start_server(tmp_path, port)
    uri = f"http://127.0.0.1:{port}"
    tracker = Tracker(uri, experiment="killed", spool=tmp_path / "spool", flush_seconds=0.1)
    tracker.start_run("run", recipe_yaml="", parameters={}, tags={"recipe": "tiny"})
    tracker.start_stage("base", "k1", config={}, inputs={})

    def say() -> None:
        for step in range(POINTS):
            tracker.log_metrics("base", step, {"loss": float(step)})
            time.sleep(0.02)

    speaker = threading.Thread(target=say)
    speaker.start()
    time.sleep(POINTS * 0.02 / 2)
    os.killpg(server.pid, signal.SIGKILL)
    server.wait()
    server = start_server(tmp_path, port)
    speaker.join()
    tracker.end_stage("base", status="FINISHED")
    assert tracker.end_run("FINISHED") == []
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("killed").experiment_id
    (run,) = client.search_runs([experiment], "tags.`cascade.stage` = 'base'")
    assert [point.step for point in client.get_metric_history(run.info.run_id, "loss")] == list(range(POINTS))
    assert run.info.status == "FINISHED"
    os.killpg(server.pid, signal.SIGTERM)
    server.wait(30)
