"""`kill -9` at a random step between two checkpoints of each training stage: the weights end as if nothing had been."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file
from torch import Tensor

from components.runtime.storage.artifact import load_artifact
from components.runtime.storage.store import Store
from tests.distributed.recording import FileRecorder
from tests.distributed.runs import STAGES
from tests.faults.conftest import Record
from tests.tiny_training import assert_equal_bits

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1200)]
PROVES = ("components/training",)
SEED = 7
STEPS, INTERVAL = 1000, 100
WORKERS = 2
DEADLINE = 400  # seconds


def start(folder: Path, kind: str) -> subprocess.Popen:
    """A driver of its own, with a Ray of its own."""
    numbers = [f"total_steps={STEPS}", f"checkpoint_every={INTERVAL}", f"sample_every={STEPS}", f"log_every={INTERVAL}"]
    command = [sys.executable, "-m", "tests.distributed.runs", str(folder), kind, str(WORKERS), *numbers]
    with open(folder / "driver.log", "ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)


def finish(folder: Path, driver: subprocess.Popen) -> None:
    assert driver.wait(DEADLINE) == 0, (folder / "driver.log").read_text()[-3000:]


def weights(folder: Path, kind: str) -> dict[str, Tensor]:
    artifact = load_artifact(Store(str(folder / kind)))
    assert artifact is not None
    return load_file(artifact.download(folder / "model") / "model.safetensors")


def wait_for_step(folder: Path, kind: str, step: int) -> dict:
    """The first progress line at or after `step`."""
    recorder, deadline = FileRecorder(folder / f"{kind}.jsonl"), time.monotonic() + DEADLINE
    while time.monotonic() < deadline:
        for line in recorder.lines("progress"):
            if line["step"] >= step:
                return line
        time.sleep(0.05)
    raise TimeoutError((folder / "driver.log").read_text()[-3000:])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of runs that nobody disturbs, made when they are first asked for."""
    return {kind: tmp_path_factory.mktemp(kind) for kind in STAGES}


def folder_of(undisturbed: dict[str, Path], kind: str) -> Path:
    folder = undisturbed[kind]
    if not (folder / kind).exists():
        finish(folder, start(folder, kind))
    return folder


@pytest.mark.parametrize("kind", STAGES)
@pytest.mark.parametrize("victim", ["worker", "driver"])
def test_kill_changes_no_bit(
    kind: str, victim: str, undisturbed: dict[str, Path], tmp_path: Path, record: Record
) -> None:
    original = folder_of(undisturbed, kind)
    for given in original.iterdir():  # the stages before it are not what is killed
        if given.is_dir() and given.name not in (kind, "model"):
            shutil.copytree(given, tmp_path / given.name)
    step = random.Random(f"{SEED} {victim} {kind}").randrange(INTERVAL + 20, STEPS - INTERVAL)
    driver = start(tmp_path, kind)
    reached = wait_for_step(tmp_path, kind, step)
    assert reached["step"] < STEPS, "too fast to be killed in time"
    print(f"{kind}: kill -9 of the {victim} after step {reached['step']}")
    os.kill(reached["pid"] if victim == "worker" else driver.pid, signal.SIGKILL)
    if victim == "driver":
        driver.wait()
        psutil.wait_procs([psutil.Process(pid) for pid in (reached["pid"],) if psutil.pid_exists(pid)], timeout=60)
        driver = start(tmp_path, kind)
    finish(tmp_path, driver)
    pids = {line["pid"] for line in FileRecorder(tmp_path / f"{kind}.jsonl").lines("progress")}
    assert len(pids) == 2, "nothing was resumed"
    assert_equal_bits(weights(tmp_path, kind), weights(original, kind))
    record(f"kill -9 of the {victim} of {kind}", 1, f"resumed at step {reached['step']} or before: every bit the same")
