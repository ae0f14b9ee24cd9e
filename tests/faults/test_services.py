"""What runs next to a run, or against it: an MLflow server that is away, other drivers, clocks, a cloud's notice."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import psutil
import pytest
from mlflow.tracking import MlflowClient

from components.runtime import events
from components.runtime.storage.garbage import find_garbage
from components.runtime.storage.store import Store
from components.runtime.tracking.names import environment
from components.runtime.tracking.tracker import Tracker
from tests.conftest import free_port, wait_for
from tests.faults.cluster import TRAINER, nodes, processes
from tests.faults.conftest import Record, Undisturbed
from tests.faults.runs import CASCADE, DEADLINE, INTERVAL, Run, kill_group, wait_until

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1500)]
PROVES = ("components/runtime/storage", "components/runtime/tracking", "pipelines/engine/execute.py")
POINTS = 600
STEPS, LONG = 160, 800
CLOUDS = {"gs": "Google's emulator", "az": "Azurite"}


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


def test_a_server_killed_at_any_moment_loses_no_point_and_doubles_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record: Record
):
    for name, value in environment(timeout_s=10, retries=0).items():
        monkeypatch.setenv(name, value)
    port = free_port()
    server = start_server(tmp_path, port)
    uri = f"http://127.0.0.1:{port}"
    tracker = Tracker(uri, experiment="killed", spool=tmp_path / "spool", flush_seconds=0.1)
    tracker.emit(events.RunStarted("run", "", {}, {"name": "tiny"}))
    tracker.emit(events.StageStarted("base", "k1", {}, {}))

    def say() -> None:
        for step in range(POINTS):
            tracker.emit(events.Metrics("base", step, {"loss": float(step)}))
            time.sleep(0.02)

    speaker = threading.Thread(target=say)
    speaker.start()
    time.sleep(POINTS * 0.02 / 2)
    os.killpg(server.pid, signal.SIGKILL)
    server.wait()
    server = start_server(tmp_path, port)
    speaker.join()
    tracker.emit(events.StageEnded("base", "FINISHED"))
    assert tracker.close("FINISHED") == []
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("killed").experiment_id
    (run,) = client.search_runs([experiment], "tags.`cascade.stage` = 'base'")
    assert [point.step for point in client.get_metric_history(run.info.run_id, "loss")] == list(range(POINTS))
    assert run.info.status == "FINISHED"
    os.killpg(server.pid, signal.SIGTERM)
    server.wait(30)
    record("MLflow server killed while points flow", 1, f"{POINTS} of {POINTS} points, each once")


def test_drivers_that_race_with_clocks_that_disagree_do_each_stage_once(
    tmp_path: Path, undisturbed: Undisturbed, record: Record
):
    """Two and then four drivers, each with a Ray of its own; the one that works is killed when it has a checkpoint."""
    for count, clocks in ((2, (0, 3600)), (4, (0, 3600, -3600, 86400))):
        run = Run(tmp_path / f"{count}-drivers", steps=STEPS)
        drivers = [run.start(**clock(tmp_path, seconds)) for seconds in clocks]
        wait_until(lambda run=run: run.step() >= INTERVAL, run)
        holder = json.loads(lease(run)[-1])["pid"]
        (working,) = [driver for driver in drivers if holder in family(driver)]
        kill_group(working)
        for driver in drivers:
            if driver is not working:
                run.finish(driver)
        assert len(lease(run)) <= count
        attempts = [name for name in run.stage("base").folders() if name.startswith("attempt-")]
        assert len(attempts) == 1, "two drivers finished the same stage"
        assert run.hashes() == undisturbed(STEPS)
        proof = f"one attempt, same weights, sha256 {run.hashes()['base'][:12]}…"
        record(f"{count} drivers race, their clocks apart by up to {max(clocks) // 3600} h", count, proof)
        record(f"kill -9 of the one of {count} that works", 1, proof)


@pytest.mark.parametrize("kind", ["gs", "az"])
def test_drivers_that_race_on_a_cloud_do_each_stage_once(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path, undisturbed: Undisturbed, record: Record
):
    """Two drivers, each with a Ray of its own; the one that works is killed when it has a checkpoint."""
    bucket = request.getfixturevalue(f"{kind}_bucket")
    run = Run(tmp_path / kind, steps=STEPS, storage=f"{bucket}/runs")
    drivers = [run.start(), run.start()]
    wait_until(lambda: run.step() >= INTERVAL, run)
    (working,) = [driver for driver in drivers if json.loads(lease(run)[-1])["pid"] in family(driver)]
    kill_group(working)
    for driver in drivers:
        if driver is not working:
            run.finish(driver)
    assert len(lease(run)) <= 2
    attempts = [name for name in run.stage("base").folders() if name.startswith("attempt-")]
    assert len(attempts) == 1, "two drivers finished the same stage"
    assert run.hashes() == undisturbed(STEPS)
    proof = f"one attempt, same weights, sha256 {run.hashes()['base'][:12]}…"
    record(f"{CLOUDS[kind]}: 2 drivers race, kill -9 of the one that works", 1, proof)


@pytest.mark.parametrize("kind", ["gs", "az"])
def test_smoke_runs_to_its_end_on_a_cloud(kind: str, request: pytest.FixtureRequest, tmp_path: Path, record: Record):
    """Every stage; then nothing is left to do, every file is as it was written, and no garbage stays."""
    storage = f"{request.getfixturevalue(f'{kind}_bucket')}/runs"
    smoke = ["run", "--recipe", "smoke", "--storage", storage, "--tracking", "none"]
    assert f"report: {storage}" in " ".join(command(smoke, tmp_path).split())
    made = Store(storage).list("stages")
    command(smoke, tmp_path)
    assert Store(storage).list("stages") == made, "what is finished was made again"
    assert "all as their manifests say" in command(["verify", "--storage", storage], tmp_path)
    command(["gc", "--yes", "--storage", storage], tmp_path)
    assert find_garbage(Store(storage)) == []
    assert "all as their manifests say" in command(["verify", "--storage", storage], tmp_path)
    record(f"{CLOUDS[kind]}: smoke to its end, again, verify, gc", 1, f"{len(made)} files, none made again, all whole")


def command(arguments: list[str], place: Path) -> str:
    """What a command says that succeeds."""
    done = subprocess.run([CASCADE, *arguments], cwd=place, capture_output=True, text=True, timeout=DEADLINE)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-4000:]
    assert "Traceback" not in said
    return said


def clock(place: Path, seconds: int) -> dict[str, str]:
    """Environment of a driver whose processes all see another time: `time.time` is replaced as Python starts."""
    folder = place / f"clock{seconds}"
    folder.mkdir(exist_ok=True)
    program = f"""
        import time
        real = time.time
        def moved() -> float:
            return real() + {seconds}
        time.time = moved
    """
    (folder / "sitecustomize.py").write_text(textwrap.dedent(program))
    return {"PYTHONPATH": os.pathsep.join([str(folder), str(Path.cwd()), os.environ.get("PYTHONPATH", "")])}


def lease(run: Run) -> list[bytes]:
    store = run.stage("base").join("lease")
    return [store.read(file.path) for file in store.list()]


def family(driver: subprocess.Popen) -> set[int]:
    return {driver.pid} | {process.pid for process in psutil.Process(driver.pid).children(recursive=True)}


def test_a_node_that_is_announced_to_go_costs_no_step(tmp_path: Path, undisturbed: Undisturbed, record: Record):
    """Ray is told as a cloud tells it; training saves at the step where it hears it and goes on on another node."""
    run = Run(tmp_path, steps=LONG)
    with nodes(2) as cluster:
        driver = run.start(RAY_ADDRESS=cluster.address)
        wait_until(lambda: run.step() >= INTERVAL and cluster.working() is not None, run)
        node = cluster.working()
        cluster.drain(node, seconds=120)
        wait_until(lambda: not processes(node, TRAINER), run)
        saved = run.step()
        cluster.kill(node)
        run.finish(driver)
    assert saved < LONG, "the run ended before the notice came"
    assert f"a node is being taken away: saved at step {saved}, going on elsewhere" in " ".join(run.said().split())
    hashes = run.hashes()
    assert hashes == undisturbed(LONG)
    record("notice that a node goes", 1, f"saved at step {saved}, same weights, sha256 {hashes['base'][:12]}…")
