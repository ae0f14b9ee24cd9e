"""What a device has room for is found by real workers on Ray Train, kept, and used by every restart; a device that runs
out later costs one line and no step. The device is played by the task."""

import json
import os
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from components.runtime.execution import Resources
from components.runtime.storage.store import Store
from components.training.launch import TrainingError, train
from components.training.loop import Arrays, Batch, Metrics
from components.training.memory import KEPT
from components.training.results import ModelDescription, Trained
from components.training.run_folder import last_checkpoint
from components.training.tasks.diffusion import DiffusionTask
from components.training.worker import TrainingJob
from tests.checkpoints import last_weights as run_weights
from tests.distributed.recording import FileRecorder
from tests.limited_memory import out_of_memory
from tests.tiny_training import DATASET_INFO, assert_equal_bits, diffusion_config, rows_at

CONFIG = diffusion_config(total_steps=20, conditions=("label",))  # checkpoints at 10 and 20, a preview at 10
BROKEN_AT = 17
ROOM = 2


class ShortTask(DiffusionTask):
    """Its device, that of the last rank, is out of memory above ROOM samples while the file `short` is there."""

    def __init__(self, config: Any, *, place: str, **options: Any) -> None:
        super().__init__(config, **options)
        self.place = Path(place)
        self.is_last = self.worker.rank == self.worker.world_size - 1

    def part_losses(self, part: Batch) -> Metrics:
        self.refuse(part["position"], "short")
        return super().part_losses(part)

    def refuse(self, rows: Any, name: str) -> None:
        if self.is_last and len(rows) > ROOM and (self.place / name).exists():
            raise out_of_memory()


class KilledTask(ShortTask):
    """Kills its process once, in step BROKEN_AT after a checkpoint; afterwards the device has room for all."""

    def train_step(self, batch: Batch, step: int) -> Metrics:
        if step == BROKEN_AT and self.is_last and (self.place / "short").exists():
            while last_checkpoint(Store(f"{self.place}/train/key")) is None:
                time.sleep(0.1)
            (self.place / "short").unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().train_step(batch, step)


class LateTask(ShortTask):
    """Runs out where a file says: `step` (in step BROKEN_AT, after a checkpoint), `evaluation`, `preview`."""

    def train_step(self, batch: Batch, step: int) -> Metrics:
        if step == BROKEN_AT and self.is_last:
            while last_checkpoint(Store(f"{self.place}/train/key")) is None:
                time.sleep(0.1)
            self.refuse(batch["position"] if self.max_batch is None else range(self.max_batch), "step")
        return super().train_step(batch, step)

    def evaluate(self, held_out: Arrays) -> dict[str, float]:
        self.refuse(range(self.max_batch or 8), "evaluation")
        return super().evaluate(held_out)

    def preview(self, held_out: Arrays, step: int) -> dict[str, bytes]:
        self.refuse(range(self.max_batch or 8), "preview")
        return super().preview(held_out, step)


def rank_rows(*, rank: int, world_size: int, start_step: int) -> Iterator[Arrays]:
    size = CONFIG.optimization.global_batch_size
    for step in range(start_step, CONFIG.optimization.total_steps):
        yield rows_at(CONFIG, range(step * size + rank, (step + 1) * size, world_size))


def run(
    folder: Path, make_task: Any, *, workers: int = 2, tries: bool = False, failures: int = 1, **resources: Any
) -> Trained:
    """Train in `folder`, resuming what is there."""
    return train(
        TrainingJob(
            partial(make_task, CONFIG, dataset_info=DATASET_INFO, place=str(folder)),
            config=CONFIG.optimization,
            stage="base",
            key="key",
            folder=Store(str(folder / "train")),
            stream=rank_rows,
            held_out=partial(rows_at, CONFIG, range(1000, 1008)),
            recorder=FileRecorder(folder / "log.jsonl"),
            resources=Resources(num_workers=workers, cpus_per_worker=0.5, max_failures=failures, **resources),
            store=Store(str(folder)),
            model=ModelDescription("unet", CONFIG.network_arguments(DATASET_INFO), settings={}),
            tries_memory=tries,
        )
    )


def last_weights(folder: Path) -> dict[str, Tensor]:
    """Of the last checkpoint, with those of the EMA."""
    return run_weights(Store(str(folder / "train" / "key")), folder / "fetched", step=CONFIG.optimization.total_steps)


@pytest.fixture(scope="module")
def told(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """The weights of two workers that were told to take ROOM samples at a time."""
    folder = tmp_path_factory.mktemp("told")
    run(folder, ShortTask, max_batch_per_device=ROOM)
    assert not (folder / "train" / "key" / KEPT).exists()
    return last_weights(folder)


def test_a_killed_run_goes_on_with_the_number_it_found_and_changes_no_bit(told: dict[str, Tensor], tmp_path: Path):
    (tmp_path / "short").touch()
    run(tmp_path, KilledTask, tries=True)
    assert not (tmp_path / "short").exists()  # it was killed: another try would have found room for more
    assert json.loads((tmp_path / "train" / "key" / KEPT).read_text()) == {"max_batch_per_device": ROOM}
    assert_equal_bits(last_weights(tmp_path), told)
    recorder = FileRecorder(tmp_path / "log.jsonl")
    lines = [line["line"] for line in recorder.lines("warning")]
    assert lines == ["memory for 2 of a worker's 4 samples at a time: each step takes them in 2 parts"]
    found = [line["max_batch_per_device"] for line in recorder.lines("metrics") if "max_batch_per_device" in line]
    assert found == [ROOM]


@pytest.mark.parametrize(("workers", "half"), [(1, 4), (2, 2)])
def test_a_step_that_runs_out_ends_in_one_line_and_the_run_goes_on_from_its_checkpoint(
    ray_cluster: None, workers: int, half: int, tmp_path: Path
) -> None:
    (tmp_path / "step").touch()
    with pytest.raises(TrainingError) as refused:
        run(tmp_path, LateTask, workers=workers, failures=0)
    ended = "stopped" if workers == 1 else "failed"
    assert str(refused.value) == (
        f"base {ended}: cpu of worker {workers - 1} is out of memory with {2 * half} samples at a time: "
        f"set max_batch_per_device: {half} in the profile, and run again: it goes on from its last checkpoint"
    )
    assert last_checkpoint(Store(str(tmp_path / "train" / "key"))) == ("step-000000010", 10)
    if workers == 1:
        assert (
            run(tmp_path, LateTask, workers=1, max_batch_per_device=ROOM).summary["steps"]
            == CONFIG.optimization.total_steps
        )


def test_a_preview_that_runs_out_is_left_out_and_an_evaluation_that_does_leaves_the_finished_training(
    ray_cluster: None, tmp_path: Path
) -> None:
    (tmp_path / "preview").touch()
    (tmp_path / "evaluation").touch()
    with pytest.raises(TrainingError, match="base stopped: cpu of worker 0 is out of memory with 8 samples at a time"):
        run(tmp_path, LateTask, workers=1)
    assert last_checkpoint(Store(str(tmp_path / "train" / "key"))) == ("step-000000020", 20)
    recorder = FileRecorder(tmp_path / "log.jsonl")
    (line,) = (warning["line"] for warning in recorder.lines("warning"))
    assert line.startswith("no preview at step 10: cpu of worker 0 is out of memory with 8 samples at a time: set max_")
    assert not recorder.lines("image")
    trained = run(tmp_path, LateTask, workers=1, max_batch_per_device=ROOM)
    assert trained.summary["held_out_loss"] > 0
    assert recorder.lines("image")
