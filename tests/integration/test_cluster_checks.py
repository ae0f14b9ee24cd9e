"""What a cluster does not have is said before anything starts, in one line and with exit code 2: a real head with token
authentication, and the command as a user types it.
"""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.conftest import free_port, stop

ROOT = Path(__file__).resolve().parents[2]
TOKEN, OTHER_TOKEN = "5ec7e7" * 10 + "beef", "0ddba11" * 9
PROGRAM = [sys.executable, "pipelines/full_cascade.py", "--recipe", "smoke", "--tracking", "none"]


def environment(**variables: str) -> dict[str, str]:
    """This one without what it says of Ray, and with `variables`."""
    return {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | variables


@pytest.fixture(scope="module")
def head() -> Iterator[str]:
    """Address of a head without logical CPUs, which asks for TOKEN."""
    logs = tempfile.mkdtemp(prefix="r", dir="/tmp")  # sockets need a short path
    address = f"127.0.0.1:{free_port()}"
    command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--disable-usage-stats"]
    command += ["--port", address.partition(":")[2], "--num-cpus", "0", "--include-dashboard", "false"]
    command += ["--temp-dir", logs, "--dashboard-agent-listen-port", "0", "--ray-client-server-port", str(free_port())]
    variables = environment(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN)
    process = subprocess.Popen(command, cwd=ROOT, env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not listens(address):
        assert process.poll() is None, "the head ended"
        assert time.monotonic() < deadline, "the head does not start"
        time.sleep(0.2)
    yield address
    stop(process)
    shutil.rmtree(logs, ignore_errors=True)


def listens(address: str) -> bool:
    host, _, port = address.partition(":")
    with socket.socket() as probe:
        return probe.connect_ex((host, int(port))) == 0


@pytest.fixture(scope="module")
def refusals(head: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, subprocess.CompletedProcess[str]]:
    """What the command says to those who can't join, all asked at once."""
    cases = {
        "no token": environment(RAY_ADDRESS=head),
        "wrong token": environment(RAY_ADDRESS=head, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=OTHER_TOKEN),
        "nobody there": environment(
            RAY_ADDRESS=f"127.0.0.1:{free_port()}", RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN
        ),
    }
    storage = tmp_path_factory.mktemp("refused")

    def ask(case: str) -> subprocess.CompletedProcess[str]:
        command = [*PROGRAM, "--storage", str(storage / case)]
        return subprocess.run(command, cwd=ROOT, env=cases[case], capture_output=True, text=True, timeout=180)

    with ThreadPoolExecutor() as pool:
        return dict(zip(cases, pool.map(ask, cases), strict=True))


@pytest.mark.parametrize(
    ("case", "line"),
    [
        ("no token", "asks for a token; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN to the cluster's own"),
        ("wrong token", "refuses the token of RAY_AUTH_TOKEN; set RAY_AUTH_TOKEN to the cluster's own"),
        ("nobody there", "no Ray cluster answers at 127.0.0.1:"),
    ],
)
def test_who_can_not_join_is_told_why_in_one_line(refusals: dict, case: str, line: str):
    done = refusals[case]
    assert done.returncode == 2
    assert done.stdout == ""
    (said,) = done.stderr.strip().splitlines()
    assert said.startswith("error: ")
    assert line in said
