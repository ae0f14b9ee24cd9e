"""Laws of saving: a checkpoint is the state of its step whatever is trained meanwhile; at most one is on its way."""

import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray.train
import torch
from ray.train import CheckpointUploadMode

from components.runtime.execution import Resources
from components.runtime.storage.scratch import SCRATCH
from components.runtime.storage.store import Store
from components.training import worker
from components.training.batches import to_batch
from components.training.checkpoint import copy_to_host, write_host_copy
from components.training.loop import Task, fit
from components.training.parallel import ALONE
from components.training.reporting import Reporter
from components.training.results import ModelDescription
from components.training.run_folder import checkpoint_name, storage_of
from components.training.worker import Saver, TrainingJob
from tests.checkpoints import read_folder, read_run, write_checkpoint
from tests.distributed.recording import FileRecorder
from tests.tiny_training import assert_equal_bits, batches, diffusion_config, make_task

CONFIG = diffusion_config(total_steps=20, checkpoint_every=5, log_every=2)
HELD = 0.5  # seconds
NAMES = [checkpoint_name(step) for step in (5, 10, 15, 20)]


class RayQueue:
    """What Ray Train does with the reports of one rank: a thread sends them, from a queue without bound (ray 2.60)."""

    def __init__(self, run: Store) -> None:
        self.thread = ThreadPoolExecutor(1)
        path, filesystem = storage_of(run)
        name = SimpleNamespace(build_checkpoint_path_from_name=f"{path}/{{}}".format, storage_filesystem=filesystem)
        self.context = SimpleNamespace(get_storage=lambda: name)

    def report(self, metrics: dict[str, Any], **options: Any) -> None:
        send = partial(options["checkpoint_upload_fn"], options["checkpoint"], options["checkpoint_dir_name"])
        sent = self.thread.submit(send)
        if options["checkpoint_upload_mode"] == CheckpointUploadMode.SYNC:
            sent.result()


class SlowStore:
    """A store into which nothing goes before it is open; what came to its door is counted."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.upload, self.open, self.came = worker.upload_folder, threading.Event(), []
        monkeypatch.setattr(worker, "upload_folder", self.send)

    def send(self, local: Path, run: Store, name: str) -> None:
        self.came.append(name)
        assert self.open.wait(120)
        self.upload(local, run, name)


class Training:
    """A training that is saved in `folder/run` as a worker saves it."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (folder / "temporary").mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(folder / "temporary"))
        self.scratch, self.run, self.step = folder / "temporary", Store(str(folder / "run")), 0
        queue, self.recorder = RayQueue(self.run), FileRecorder(folder / "log.jsonl")
        monkeypatch.setattr(ray.train, "report", queue.report)
        monkeypatch.setattr(ray.train, "get_context", lambda: queue.context)
        description = ModelDescription("unet", {}, {})
        parts = (iter, dict, self.recorder, Resources(), self.run, description)
        job = TrainingJob(make_task, CONFIG.optimization, "base", "run", Store(str(folder)), *parts)
        options = {"stage": "base", "worker": ALONE, "recorder": self.recorder, "start_step": 0}
        self.reporter = Reporter(CONFIG.optimization, **options)
        self.saver = Saver(job, self.reporter, {})
        self.waits, wait = 0, self.saver.idle.wait

        def count() -> bool:
            self.waits += 1
            return wait()

        monkeypatch.setattr(self.saver.idle, "wait", count)

    def counted(self) -> Iterator[Any]:
        for batch in batches(CONFIG, to_batch):
            self.step += 1
            yield batch

    def fit(self) -> None:
        fit(make_task(CONFIG), self.counted(), CONFIG.optimization, log=self.reporter.log, save=self.saver.save)

    def on_disk(self) -> int:
        """Checkpoints in the node's temporary folder."""
        return sum(path.is_dir() for path in self.scratch.glob(f"{SCRATCH}checkpoint-*"))


def soon(condition: Any) -> None:
    """Wait until a condition is true."""
    for _ in range(12_000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it never was")


@contextmanager
def held_back(store: SlowStore, training: Training) -> Iterator[None]:
    """Inside, training waits with its second checkpoint, for the store has not taken the first; then it ends."""
    with ThreadPoolExecutor(1) as thread:
        trained = thread.submit(training.fit)
        soon(lambda: training.waits == 2 or trained.done())
        time.sleep(HELD)
        yield
        store.open.set()
        trained.result()


def test_training_goes_on_while_one_checkpoint_is_sent_and_waits_with_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, training = SlowStore(monkeypatch), Training(tmp_path, monkeypatch)
    with held_back(store, training):
        reached = (training.step, [*store.came], training.on_disk())
    assert reached == (10, NAMES[:1], 1)
    assert store.came == NAMES
    assert training.on_disk() == 0


def test_what_is_saved_is_the_state_of_its_step_whatever_is_trained_while_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, training = SlowStore(monkeypatch), Training(tmp_path, monkeypatch)
    written = worker.write_host_copy

    def write_late(folder: Path, copy: Any) -> None:
        soon(lambda: training.step >= min(copy.state["step"] + 5, 20))
        written(folder, copy)

    monkeypatch.setattr(worker, "write_host_copy", write_late)
    store.open.set()
    training.fit()

    def save(step: int, task: Task) -> None:
        write_checkpoint(tmp_path / "right" / checkpoint_name(step), task.state_dict(), step=step)

    fit(make_task(CONFIG), batches(CONFIG, to_batch), CONFIG.optimization, save=save)
    for name in NAMES:
        step, found = read_run(training.run, name, tmp_path / name)
        right_step, right = read_folder(tmp_path / "right" / name)
        assert step == right_step
        assert_equal_bits(found["weights"], right["weights"])
        assert_equal_bits(moments(found), moments(right))


def moments(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Of the optimizer, by parameter and name."""
    kept = state["learner"]["optimizer"]["state"]
    return {f"{number}.{name}": value for number, own in kept.items() for name, value in own.items()}


def test_a_copy_brings_back_the_generators_of_its_own_moment(tmp_path: Path) -> None:
    copy = copy_to_host({"weights": {"a": torch.zeros(2)}}, step=3)
    drawn = torch.rand(3)
    write_host_copy(tmp_path / "late", copy)
    read_folder(tmp_path / "late")
    assert torch.equal(torch.rand(3), drawn)


def test_seconds_that_checkpoints_hold_training_are_logged_once_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    store, training = SlowStore(monkeypatch), Training(tmp_path, monkeypatch)
    with held_back(store, training):
        pass
    rows = {row["step"]: row for row in training.recorder.lines("metrics") if "checkpoint_hold_seconds" in row}
    assert [*rows] == [6, 12, 16]  # the first that are logged after 5, 10 and 15
    for step, row in rows.items():
        waited = HELD if step == 12 else 0  # for the checkpoint of step 5
        assert row["checkpoint_hold_seconds"] >= row["checkpoint_copy_seconds"] + waited > waited


def test_a_store_that_fails_leaves_no_checkpoint_on_the_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training(tmp_path, monkeypatch)
    fails = SimpleNamespace(left=1)

    def upload(local: Path, run: Store, name: str) -> None:
        if fails.left:
            fails.left -= 1
            raise OSError("no")

    monkeypatch.setattr(worker, "upload_folder", upload)
    training.saver.save(5, make_task(CONFIG))
    soon(training.saver.idle.is_set)  # or the next would wait for ever
    training.saver.save(10, make_task(CONFIG))
    soon(lambda: training.on_disk() == 0)
    assert training.run.list() == []
