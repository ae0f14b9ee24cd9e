"""`cascade serve` as a user types it, and README's lines to ask it."""

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from email.message import Message
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import psutil
import pytest

from components.configuration.usage import UsageError
from components.serving import deployment
from pipelines.command import serve
from pipelines.planning.profiles import Cluster
from tests.conftest import free_port
from tests.in_process import in_process
from tests.refusals import assert_refused
from tests.served_models import CHAMPION, Registry
from tests.tiny_cascade import write_cascade

ROOT = Path(__file__).resolve().parents[2]
CASCADE = str(Path(sys.executable).with_name("cascade"))
START_SECONDS, END_SECONDS = 240, 90
README_ADDRESS = "127.0.0.1:8000"


class Served(NamedTuple):
    process: subprocess.Popen
    address: str
    lines: list[str]  # that were printed
    environment: dict[str, str]
    ray: Path  # where this Ray keeps what it writes


@pytest.fixture(scope="module")
def registry(empty_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Registry:
    home = tmp_path_factory.mktemp("served")
    made = Registry(home, empty_database)
    made.register(write_cascade(home / "cascade"), key="k1")
    return made


@pytest.fixture(scope="module")
def environment() -> Iterator[dict[str, str]]:
    """Of a user who was told of no cluster, with a folder for Ray of its own."""
    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp") as folder:  # short: Ray's sockets are in it
        yield {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {"RAY_TMPDIR": folder}


@pytest.fixture(scope="module")
def served(registry: Registry, environment: dict[str, str], tmp_path_factory) -> Iterator[Served]:
    """The command at work, in a folder without a ./runs."""
    folder, port = tmp_path_factory.mktemp("user"), free_port()
    command = [CASCADE, "serve", "--model", CHAMPION, "--tracking", registry.uri, "--port", str(port)]
    log = folder / "printed"
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=file, stderr=file, start_new_session=True
        )
    try:
        deadline = time.monotonic() + START_SECONDS
        while " serves " not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        lines = log.read_text().splitlines()
        yield Served(process, f"http://127.0.0.1:{port}", lines, environment, Path(environment["RAY_TMPDIR"]))
    finally:
        for each in family(process):
            each.kill()


def family(process: subprocess.Popen) -> list[psutil.Process]:
    """The command's process and all that it started."""
    try:
        parent = psutil.Process(process.pid)
    except psutil.NoSuchProcess:
        return []
    return [parent, *parent.children(recursive=True)]


def test_it_prints_its_address_and_what_it_serves_and_nothing_else(served: Served):
    name = CHAMPION.removeprefix("models:/").partition("@")[0]
    assert served.lines == [f"{served.address} serves {name}: {CHAMPION}, version 1"]


def test_the_readme_s_lines_to_ask_it_run(served: Served, tmp_path: Path):
    blocks = re.findall(r"^```(?:bash|sh)\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    asked = [block for block in blocks if README_ADDRESS in block]
    assert asked
    for block in asked:
        lines = [line for line in continued(block) if README_ADDRESS in line and "cascade serve" not in line]
        script = "\n".join(lines).replace(README_ADDRESS, served.address.removeprefix("http://"))
        script = script.replace("a large red sphere", "red apple")  # words that the tiny model was taught
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, (script, done.stdout[-500:], done.stderr[-500:])
        assert '"error"' not in done.stdout


def continued(block: str) -> list[str]:
    """A block's commands, each with the lines that it goes on in."""
    return re.sub(r"\\\n\s*", "", block).splitlines()


def test_ray_s_workers_are_no_nicer_than_the_command(served: Served):
    """Ray gives its workers nice 15 where nothing is said: beside other programs, images would wait."""
    replicas = [each for each in family(served.process) if each.name().startswith("ray::ServeRepli")]
    assert len(replicas) == 2
    assert {each.nice() for each in replicas} == {psutil.Process(served.process.pid).nice()}


def test_who_asks_while_the_api_is_lost_is_told_to_come_back_and_then_answered(served: Served):
    (api,) = [each for each in family(served.process) if each.name().startswith("ray::ServeRepli") and is_api(each)]
    api.kill()
    codes, deadline = [], time.monotonic() + START_SECONDS
    while 200 not in codes and time.monotonic() < deadline:
        code, headers, body = ask(f"{served.address}/v1/models")
        codes.append(code)
        if code != 200:
            assert headers["Retry-After"] is not None
            assert b'"error"' in body
            time.sleep(0.5)
    assert codes[-1] == 200
    assert set(codes) <= {200, 503}


def ask(url: str) -> tuple[int, Message, bytes]:
    try:
        with urllib.request.urlopen(url, timeout=60) as answer:
            return answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read()


def is_api(process: psutil.Process) -> bool:
    return "Api" in " ".join(process.cmdline())


WRONG = {
    "can't get models:/image-cascade-none@champion from the registry": [
        "--model",
        "models:/image-cascade-none@champion",
    ],
    "no model at nowhere; give models:/NAME@champion": ["--model", "nowhere"],
    "set CASCADE_API_KEYS (keys by commas) or CASCADE_API_KEYS_FILE": ["--model", CHAMPION, "--host", "0.0.0.0"],
    "max_replicas must be at least 4, not 1": ["--model", CHAMPION, "--replicas", "4..1"],
    "write a number, or the least and the most such as 1..4": ["--model", CHAMPION, "--replicas", "many"],
    "name them with NAME=SOURCE": ["--model", CHAMPION, "--model", CHAMPION],
    "write SOURCE or NAME=SOURCE": ["--model", "a="],
}


def test_wrong_use_is_one_line_and_exit_code_2_before_anything_starts(
    served: Served, registry: Registry, tmp_path: Path
):
    port = served.address.rpartition(":")[2]
    taken = f"can't listen at 127.0.0.1:{port}, another program listens there: choose another with --port"
    wrong = WRONG | {"tokenizer makes no image": ["--model", str(registry.home / "cascade/cascade/tokenizer")]}
    wrong[taken] = ["--model", CHAMPION, "--port", port]
    with mock.patch.object(serve, "start_ray", side_effect=AssertionError("a Ray is started")):
        for words, options in wrong.items():
            done = in_process("serve", *options, "--tracking", registry.uri, cwd=tmp_path)
            assert_refused(done, words)
            assert done.stdout == ""
            assert list(tmp_path.iterdir()) == []


def test_keys_of_the_shell_bind_the_process_that_answers_on_a_cluster_too(registry: Registry, tmp_path: Path):
    """It reads its own environment, which is not the shell's: without keys there it refuses to answer."""
    joined = {"start_ray": mock.Mock(return_value=Cluster(cpus=2)), "on_cluster": mock.Mock(return_value=True)}
    with (
        mock.patch.multiple(serve, end_by_signals=mock.DEFAULT, **joined),
        mock.patch.dict(os.environ, {"CASCADE_API_KEYS": "k" * 32}),
        mock.patch.multiple(deployment, check_room=mock.DEFAULT, end_service=mock.DEFAULT),
        mock.patch.object(deployment, "run_service", side_effect=UsageError("the rest is other tests'")) as run_service,
    ):
        in_process("serve", "--model", CHAMPION, "--gpus", "0", "--tracking", registry.uri, cwd=tmp_path)
    (settings,) = run_service.call_args.args
    assert settings.keys_required


def test_sigterm_ends_it_with_exit_code_0_and_leaves_no_process(served: Served):
    """The last one of this file: it ends what the others ask."""
    everything = family(served.process)
    assert len(everything) > 5
    served.process.send_signal(signal.SIGTERM)
    assert served.process.wait(END_SECONDS) == 0
    _, alive = psutil.wait_procs(everything, timeout=30)
    assert [each.name() for each in alive] == []
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", int(served.address.rpartition(":")[2]))) != 0
