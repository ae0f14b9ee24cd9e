"""`kill -9` at a random step between two checkpoints of each training stage: the weights end as if nothing had been."""

import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import psutil
import pytest

from components.runtime.storage.store import Store
from tests.distributed.recording import FileRecorder
from tests.distributed.runs import STAGES
from tests.faults.conftest import Record
from tests.faults.runs import Stored, wait_until
from tests.tiny_training import assert_equal_bits

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1200)]
PROVES = ("components/training",)
SEED = 7
STEPS, INTERVAL = 1000, 100
WORKERS = 2


class Training(Stored):
    """Trainings of one kind, each by a driver with a Ray of its own."""

    def __init__(self, place: Path, kind: str) -> None:
        super().__init__(place)
        self.kind = kind

    def start(self) -> subprocess.Popen:
        numbers = {"total_steps": STEPS, "checkpoint_every": INTERVAL, "sample_every": STEPS, "log_every": INTERVAL}
        command = [sys.executable, "-m", "tests.distributed.runs", str(self.place), self.kind, str(WORKERS)]
        return self.launch(
            *command, *(f"{name}={value}" for name, value in numbers.items()), PYTHONPATH=str(Path.cwd())
        )

    def lines(self) -> list[dict]:
        """Of progress, with step and process."""
        return FileRecorder(self.place / f"{self.kind}.jsonl").lines("progress")

    def stage(self, name: str) -> Store:
        return Store(str(self.place / name))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Training]:
    """Trainings that nobody disturbs, made when they are first asked for."""

    @cache
    def made(kind: str) -> Training:
        training = Training(tmp_path_factory.mktemp(kind), kind)
        training.finish(training.start())
        return training

    return made


@pytest.mark.parametrize("kind", STAGES)
@pytest.mark.parametrize("victim", ["worker", "driver"])
def test_kill_changes_no_bit(
    kind: str, victim: str, undisturbed: Callable[[str], Training], tmp_path: Path, record: Record
) -> None:
    original, run = undisturbed(kind), Training(tmp_path, kind)
    for given in original.place.iterdir():  # the stages before it are not what is killed
        if given.is_dir() and given.name not in (kind, "model"):
            shutil.copytree(given, tmp_path / given.name)
    step = random.Random(f"{SEED} {victim} {kind}").randrange(INTERVAL + 20, STEPS - INTERVAL)
    driver = run.start()
    wait_until(lambda: any(line["step"] >= step for line in run.lines()), run, poll=0.05)
    reached = next(line for line in run.lines() if line["step"] >= step)
    assert reached["step"] < STEPS, "too fast to be killed in time"
    print(f"{kind}: kill -9 of the {victim} after step {reached['step']}")
    os.kill(reached["pid"] if victim == "worker" else driver.pid, signal.SIGKILL)
    if victim == "driver":
        driver.wait()
        psutil.wait_procs([psutil.Process(pid) for pid in (reached["pid"],) if psutil.pid_exists(pid)], timeout=60)
        driver = run.start()
    run.finish(driver)
    assert len({line["pid"] for line in run.lines()}) == 2, "nothing was resumed"
    assert_equal_bits(run.weights(kind), original.weights(kind))
    record(f"kill -9 of the {victim} of {kind}", 1, f"resumed at step {reached['step']} or before: every bit the same")
