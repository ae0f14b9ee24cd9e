"""Laws of the session: what opens the cluster is nobody else's business."""

import stat
import subprocess
from pathlib import Path

import psutil
import pytest
import torch

from components.configuration.usage import UsageError
from pipelines.engine import session
from pipelines.engine.session import _protect_token
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
    assert given.get("RAY_LOG_MONITOR_MAX_OPEN_FILES") == (None if verbose else "0")
