"""Laws of the session: what opens the cluster is nobody else's business."""

import inspect
import stat
import subprocess
from pathlib import Path

import psutil
import pytest
import torch
from ray._private import worker as ray_worker
from ray.exceptions import OutOfMemoryError

from components.configuration.usage import UsageError
from pipelines.engine import session
from pipelines.engine.session import _protect_token, memory_line, print_shortened
from tests.refusals import one_line


@pytest.fixture(autouse=True)
def _no_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user with an empty home who was told of no cluster."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(session, "set_environment", lambda settings: None)
    monkeypatch.setattr(session, "found_cluster", lambda here: None)


def test_ray_s_token_is_private_from_its_first_moment(tmp_path: Path):
    _protect_token()
    token = tmp_path / ".ray" / "auth_token"
    assert len(token.read_text()) == 64
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert stat.S_IMODE(token.parent.stat().st_mode) == 0o700


def test_a_token_that_is_there_is_kept_and_made_private(tmp_path: Path):
    token = tmp_path / ".ray" / "auth_token"
    token.parent.mkdir()
    token.write_text("given")
    token.chmod(0o644)
    _protect_token()
    assert token.read_text() == "given"
    assert stat.S_IMODE(token.stat().st_mode) == 0o600


def test_a_home_that_can_t_be_written_is_one_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", "/proc/nowhere")
    with one_line(UsageError, "Ray's access token can't be kept: .*/proc/nowhere.*; set HOME to a folder of yours"):
        session.start_ray(worker_start_timeout=10, verbose=False)


@pytest.mark.parametrize(("failures", "tries"), [(2, 3), (0, 1)])
def test_a_ray_that_came_too_late_is_ended_and_started_again(
    monkeypatch: pytest.MonkeyPatch, failures: int, tries: int
):
    raylets: list[subprocess.Popen] = []

    def late(**kwargs: object) -> None:
        raylets.append(subprocess.Popen(["sleep", "60"]))
        if len(raylets) <= failures:
            raise Exception("The current node timed out during startup.")  # as ray/_private/node.py does

    monkeypatch.setattr(session.ray, "init", late)
    try:
        session.start_ray(worker_start_timeout=10, verbose=False)
        assert [psutil.pid_exists(raylet.pid) for raylet in raylets] == [False] * failures + [True]
        assert len(raylets) == tries
    finally:
        for raylet in raylets:
            raylet.kill()
            raylet.wait()


PAGE = """Task hog failed due to oom. Error: 2 worker(s) were killed due to the node running \
low on memory. Memory on the node (IP: 192.0.2.2, ID: ddb0) was 8.53GB used / 23.54GB limit (0.362487)
OOM kill reason: Memory usage 8704499712B exceeded threshold of 505530272B (2.0% of 25276514304B limit)
Ray killed 2 worker(s) based on the killing policy
Considered workers: [
Selected to kill: (Task: job ID=01, lease ID=01, task name=hog, required resources={CPU: 1}, pid=19917, \
actual memory used=0.22GB, worker ID=7637)
Selected to kill: (Actor(21d2): job ID=01, lease ID=02, task name=RunRecorder.__init__, required resources={}, \
pid=19916, actual memory used=0.29GB, worker ID=c71e)
]
Top 10 memory users: PID\tMEM(GB)\tCOMMAND
19916\t0.90\tray::RunRecorder
19306\t0.61\t/usr/bin/editor --of-images
Refer to the documentation on how to address the out of memory issue: https://docs.ray.io"""
LINE = (
    "memory is full (8.53GB of 23.54GB): Ray killed hog (pid 19917, 0.22GB), RunRecorder.__init__ (pid 19916, 0.29GB); "
    "close other programs (the largest: /usr/bin/editor --of-images (pid 19306, 0.61GB)), or set fewer num_workers and "
    "num_actors in the profile"
)


def test_a_page_of_ray_s_memory_killer_is_a_line_on_the_terminal_and_in_errors(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setattr(ray_worker, "print_to_stdstream", ray_worker.print_to_stdstream)  # to be as before at the end
    print_shortened()
    for page in (PAGE, "another page"):
        ray_worker.print_to_stdstream({"lines": [page], "pid": "raylet", "is_err": False}, ignore_prefix=False)
    said = capsys.readouterr().out.splitlines()
    assert [line.partition(" ")[2] for line in said] == [LINE, "another page"]
    assert memory_line(str(OutOfMemoryError(PAGE))) == LINE
    assert "print_to_stdstream(" in inspect.getsource(ray_worker.listen_error_messages), "this is how pages come"


@pytest.mark.parametrize(
    ("reason", "tries"), [("The current node timed out during startup.", 3), ("no room in /dev/shm.", 1)]
)
def test_a_machine_that_can_t_start_ray_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch, reason: str, tries: int):
    tried = []

    def never(**kwargs: object) -> None:
        tried.append(kwargs)
        raise Exception(reason)

    monkeypatch.setattr(session.ray, "init", never)
    with one_line(UsageError, match=f"{reason} Nothing was started"):
        session.start_ray(worker_start_timeout=10, verbose=False)
    assert len(tried) == tries


@pytest.mark.parametrize(("asked", "started_with"), [(None, 2), (0, 0)])
def test_a_ray_of_one_machine_has_the_gpus_that_torch_can_use_or_as_many_as_are_asked_for(
    monkeypatch: pytest.MonkeyPatch, asked: int | None, started_with: int
):
    given: dict[str, object] = {}
    monkeypatch.setattr(session.ray, "init", lambda **arguments: given.update(arguments))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    session.start_ray(worker_start_timeout=10, verbose=False, num_gpus=asked)
    assert given["num_gpus"] == started_with


@pytest.mark.parametrize("verbose", [False, True])
def test_logs_of_workers_are_read_where_somebody_is_told_of_them(monkeypatch: pytest.MonkeyPatch, verbose: bool):
    given: dict[str, str] = {}
    monkeypatch.setattr(session.ray, "init", lambda **arguments: None)
    monkeypatch.setattr(session, "set_environment", given.update)
    session.start_ray(worker_start_timeout=10, verbose=verbose)
    assert given.keys().isdisjoint(session.UNREAD) if verbose else given.items() >= session.UNREAD.items()
