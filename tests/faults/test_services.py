"""What runs next to a run, or against it: an MLflow server that is away, other drivers, clocks, a cloud's notice."""

import contextlib
import json
import os
import signal
import subprocess
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
from tests.conftest import free_port, mlflow_process
from tests.faults.cluster import TRAINER, nodes, processes
from tests.faults.conftest import Record, Undisturbed
from tests.faults.runs import CASCADE, DEADLINE, INTERVAL, Run, kill_group, wait_until

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1500)]
PROVES = ("components/runtime/storage", "components/runtime/tracking", "pipelines/engine/execute.py")
POINTS = 600
STEPS, LONG = 160, 800
CLOUDS = {"gs": "Google's emulator", "az": "Azurite"}


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


@pytest.mark.parametrize(("kind", "clocks"), [("", (0, 3600)), ("", (0, 3600, -3600, 86400)), ("gs", ()), ("az", ())])
def test_drivers_that_race_do_each_stage_once_whatever_their_clocks_and_on_clouds_too(
    kind: str,
    clocks: tuple[int, ...],
    request: pytest.FixtureRequest,
    tmp_path: Path,
    undisturbed: Undisturbed,
    record: Record,
):
    """Drivers, each with a Ray of its own; the one that works is killed when it has a checkpoint."""
    storage = f"{request.getfixturevalue(f'{kind}_bucket')}/runs" if kind else None
    run = Run(tmp_path / "run", steps=STEPS, storage=storage)
    drivers = [run.start(**clock(tmp_path, seconds)) for seconds in clocks] or [run.start(), run.start()]
    wait_until(lambda: run.step() >= INTERVAL, run)
    lease = run.stage("base").join("lease")
    holder = json.loads(lease.read(lease.list()[-1].path))["pid"]
    families = {each: [each, *psutil.Process(each.pid).children(recursive=True)] for each in drivers}
    (working,) = [each for each, family in families.items() if holder in [process.pid for process in family]]
    kill_group(working)
    for driver in drivers:
        if driver is not working:
            run.finish(driver)
    assert len(lease.list()) <= len(drivers)
    attempts = [name for name in run.stage("base").folders() if name.startswith("attempt-")]
    assert len(attempts) == 1, "two drivers finished the same stage"
    proof = f"one attempt, {run.same_as(undisturbed(STEPS))}"
    if kind:
        record(f"{CLOUDS[kind]}: 2 drivers race, kill -9 of the one that works", 1, proof)
    else:
        record(f"{len(drivers)} drivers race, their clocks apart by up to {max(clocks) // 3600} h", len(drivers), proof)
        record(f"kill -9 of the one of {len(drivers)} that works", 1, proof)


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
