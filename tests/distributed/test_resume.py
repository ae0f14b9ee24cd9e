"""A training that was killed and started again, whole or in shards, ends with the bits of one that was not."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from safetensors.torch import load_file
from torch import Tensor

from components.configuration.diffusion import DiffusionTraining
from components.configuration.optimization import StartConfig
from components.data.decoded import ImageSamples
from components.data.shards import View, load_index
from components.data.stream import rank_batches
from components.models.bundle import load_bundle
from components.runtime.execution import Resources, Sharding
from components.runtime.storage.store import Store
from components.training import worker as worker_module
from components.training.checkpoint import part_file
from components.training.launch import TrainingError, train
from components.training.loop import Arrays, Batch, Metrics
from components.training.results import ModelDescription, Trained, read_finished
from components.training.run_folder import checkpoint_name, last_checkpoint, upload_folder
from components.training.tasks.diffusion import DiffusionTask
from components.training.worker import TrainingJob
from components.weights.starts import load_start, open_start
from tests.checkpoints import last_weights as run_weights
from tests.distributed.recording import FileRecorder
from tests.distributed.runs import images_artifact, run_stage
from tests.tiny_training import DATASET_INFO, assert_equal_bits, diffusion_config, rows_at

CONFIG = diffusion_config(total_steps=30)  # checkpoints at 10, 20 and 30
KILLED_AT = 17
WORKERS = 2


class PlacedTask(DiffusionTask):
    """A task that knows the folder of its test, and its run folder in it."""

    def __init__(self, config: Any, *, place: str, **options: Any) -> None:
        super().__init__(config, **options)
        self.place, self.run, self.target = Path(place), Store(f"{place}/train/key"), Path(place) / "target"

    def saved(self) -> int:
        """Steps of the last checkpoint."""
        return (last_checkpoint(self.run) or ("", 0))[1]


class KilledTask(PlacedTask):
    """Sends SIGKILL once, from inside step KILLED_AT, to the process whose id is in a file; then the file is gone.

    It waits for the checkpoint before to be there, so that it is a resumed run that is looked at.
    """

    def train_step(self, batch: Batch, step: int) -> Metrics:
        metrics = super().train_step(batch, step)
        if step == KILLED_AT and self.worker.rank == WORKERS - 1 and self.target.exists():
            while not self.saved():
                time.sleep(0.1)
            victim = int(self.target.read_text()) or os.getpid()
            self.target.unlink()
            os.kill(victim, signal.SIGKILL)
        return metrics


class ShardedTask(KilledTask):
    """Refuses to be trained whole."""

    def make_learners(self) -> None:
        assert self.worker.shards
        super().make_learners()


class StartIsGone(ShardedTask):
    """Removes the weights that the run began with before it is killed."""

    def train_step(self, batch: Batch, step: int) -> Metrics:
        if step == KILLED_AT and self.target.exists() and self.worker.rank == 0:
            shutil.rmtree(self.place / "start")
        return super().train_step(batch, step)


class KilledWhileItSends(PlacedTask):
    """The store hangs on the checkpoint of step 20 after half of it; rank 0 is killed five steps later, once."""

    def __init__(self, config: Any, **options: Any) -> None:
        super().__init__(config, **options)
        self.is_victim = self.worker.rank == 0 and not (self.place / "last").exists()
        if self.is_victim:
            worker_module.upload_folder = self.send

    def send(self, local: Path, run: Store, name: str) -> None:
        if name == checkpoint_name(20):
            run.upload(local / part_file(0, 1), f"{name}/{part_file(0, 1)}")
            (self.place / "sending").touch()
            time.sleep(600)
        upload_folder(local, run, name)

    def train_step(self, batch: Batch, step: int) -> Metrics:
        if step == 25 and self.is_victim:
            while not (self.saved() and (self.place / "sending").exists()):
                time.sleep(0.1)
            (self.place / "last").write_text(str(self.saved()))
            os.kill(os.getpid(), signal.SIGKILL)
        return super().train_step(batch, step)


class DisturbedAtTheEnd(PlacedTask):
    """Its final evaluation fails once, by an exception or, where a file says so, by `kill -9`."""

    def evaluate(self, held_out: Arrays) -> dict[str, float]:
        if not (self.place / "failed").exists():
            (self.place / "failed").touch()
            if (self.place / "killed").exists():
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError("no space left on the device")
        return super().evaluate(held_out)


class KilledAgain(PlacedTask):
    """Sends SIGKILL to its process at steps that a file lists, each once, when the checkpoint before is there."""

    def train_step(self, batch: Batch, step: int) -> Metrics:
        steps = json.loads((self.place / "steps").read_text())
        if self.worker.rank == 0 and steps and step == steps[0]:
            while self.saved() < step // 10 * 10:
                time.sleep(0.05)
            (self.place / "steps").write_text(json.dumps(steps[1:]))
            os.kill(os.getpid(), signal.SIGKILL)
        return super().train_step(batch, step)


class PoisonedTask(DiffusionTask):
    """Its loss is never finite."""

    def part_losses(self, part: Batch) -> Metrics:
        return {name: value * float("nan") for name, value in super().part_losses(part).items()}


def run(
    folder: Path,
    make_task: Any = DiffusionTask,
    *,
    config: DiffusionTraining = CONFIG,
    workers: int = WORKERS,
    sharding: Sharding = "none",
    load_start: Callable[[Any], None] | None = None,
    **options: Any,
) -> Trained:
    """Train in `folder`, resuming what is there."""
    index = load_index(images_artifact(folder).url("index.json"))
    stream = partial(
        rank_batches,
        ImageSamples(index, View(config.data.resolution)),
        global_batch_size=config.optimization.global_batch_size,
        seed=config.optimization.seed,
        streams=config.optimization.streams,
        total_steps=config.optimization.total_steps,
    )
    dataset_info = DATASET_INFO.model_copy(
        update={"vocab_size": index.text.vocab_size, "text_length": index.text.text_length}
    )
    held_out = rows_at(config, range(1000, 1008))
    held_out["text"] = held_out["text"].repeat(2, axis=1)[:, : index.text.text_length]
    return train(
        TrainingJob(
            partial(make_task, config, dataset_info=dataset_info, **options),
            config=config.optimization,
            stage="base",
            key="key",
            folder=Store(str(folder / "train")),
            stream=stream,
            held_out=partial(dict, held_out),
            recorder=FileRecorder(folder / "log.jsonl"),
            resources=Resources(num_workers=workers, cpus_per_worker=0.5, max_failures=2, sharding=sharding),
            store=Store(str(folder)),
            model=ModelDescription("unet", config.network_arguments(dataset_info), settings={}),
            load_start=load_start,
        )
    )


def last_weights(folder: Path, config: DiffusionTraining = CONFIG) -> dict[str, Tensor]:
    """Of the last checkpoint, with those of the EMA."""
    run, steps = Store(str(folder / "train" / "key")), config.optimization.total_steps
    return run_weights(run, folder / "fetched", step=steps)


@pytest.fixture(scope="module")
def complete(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("complete")
    run(folder)
    return folder


@pytest.fixture(scope="module")
def undisturbed(complete: Path) -> dict[str, Tensor]:
    return last_weights(complete)


def test_killed_worker_changes_no_bit(undisturbed: dict[str, Tensor], tmp_path: Path) -> None:
    (tmp_path / "target").write_text("0")  # the worker itself
    run(tmp_path, KilledTask, place=str(tmp_path))
    started = {line["pid"] for line in FileRecorder(tmp_path / "log.jsonl").lines("metrics")}
    assert len(started) == 2  # rank 0 before and after
    assert_equal_bits(last_weights(tmp_path), undisturbed)


def test_losses_with_a_new_checkpoint_before_each_do_not_count(undisturbed: dict[str, Tensor], tmp_path: Path) -> None:
    """Two are allowed without one; what ends a training is a law of `unit/test_training_failures.py`."""
    (tmp_path / "steps").write_text(json.dumps([7, 17, 27, 27]))
    run(tmp_path, KilledAgain, place=str(tmp_path))
    assert json.loads((tmp_path / "steps").read_text()) == []
    assert_equal_bits(last_weights(tmp_path), undisturbed)


def test_killed_driver_changes_no_bit(undisturbed: dict[str, Tensor], tmp_path: Path) -> None:
    address = ray.get_runtime_context().gcs_address
    command = [sys.executable, "-m", "tests.distributed.test_resume", str(tmp_path), address]
    log = tmp_path / "driver.log"
    with open(log, "wb") as output:
        driver = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
    assert driver.wait(240) == -signal.SIGKILL, log.read_text()[-3000:]
    reached = last_checkpoint(Store(str(tmp_path / "train" / "key")))
    assert reached.step in (10, 20)  # workers live a little longer than their driver
    run(tmp_path)
    assert_equal_bits(last_weights(tmp_path), undisturbed)


def test_a_kill_while_a_checkpoint_is_sent_leaves_the_one_before_and_changes_no_bit(
    undisturbed: dict[str, Tensor], tmp_path: Path
) -> None:
    run(tmp_path, KilledWhileItSends, place=str(tmp_path))
    assert (tmp_path / "last").read_text() == "10"
    assert_equal_bits(last_weights(tmp_path), undisturbed)


@pytest.mark.parametrize("how", ["raised", "killed"])
def test_a_failing_evaluation_loses_no_step(undisturbed: dict[str, Tensor], tmp_path: Path, how: str) -> None:
    (tmp_path / how).touch()
    trained = run(tmp_path, DisturbedAtTheEnd, place=str(tmp_path))
    assert (tmp_path / "failed").exists()
    logged = [line["step"] for line in FileRecorder(tmp_path / "log.jsonl").lines("metrics")]
    assert logged == [5, 10, 15, 20, 25, 30]  # no step was taken twice
    assert trained.summary["held_out_loss"] > 0
    assert_equal_bits(last_weights(tmp_path), undisturbed)


def test_run_that_is_complete_is_not_started_again(complete: Path) -> None:
    log, finished = (complete / "log.jsonl").read_text(), read_finished(Store(str(complete / "train" / "key")))
    assert run(complete) == finished
    assert (complete / "log.jsonl").read_text() == log


def test_losses_that_are_not_finite_stop_the_stage_once_with_advice(ray_cluster: None, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"not finite for 5 steps in a row.*lower learning_rate"):
        run(tmp_path, PoisonedTask)
    assert last_checkpoint(Store(str(tmp_path / "train" / "key"))) is None


def test_truncated_shard_stops_the_stage_at_once_naming_it(ray_cluster: None, tmp_path: Path) -> None:
    images_artifact(tmp_path)
    shard = tmp_path / "images" / "files" / "shard-000001.tar"
    shard.write_bytes(shard.read_bytes()[:-1000])
    with pytest.raises(TrainingError, match=r"base stopped: shard .*shard-000001.tar differs: it has \d+ bytes"):
        run(tmp_path, workers=1)


def test_a_color_stops_a_model_of_one_channel_at_once_with_advice(ray_cluster: None, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"base stopped: image \d of a batch has the color .* set in_channels=3$"):
        run_stage(tmp_path, "base", workers=1, in_channels=1)


def test_batch_that_does_not_divide_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="global_batch_size 8 is no multiple of 3 workers"):
        run(tmp_path, workers=3)
    assert not (tmp_path / "train").exists()


SHARDED = diffusion_config(total_steps=20)


def test_a_killed_run_of_shards_that_began_with_weights_never_reads_them_again(complete: Path, tmp_path: Path):
    """They are gone when it is killed. Both runs begin with the model of another one, but for its table of classes; no
    bit differs, and what is kept is an ordinary model."""
    (model,) = complete.glob("attempt-*/model.json")
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    trained = {}
    for folder, task in ((undisturbed, ShardedTask), (killed, StartIsGone)):
        shutil.copytree(model.parent, folder / "start")
        if folder is killed:
            (folder / "target").write_text("0")  # the worker itself
        start = partial(
            load_start, start=open_start(StartConfig(uri=str(folder / "start"))), ignore=("class_embedding",)
        )
        options = {"config": SHARDED, "sharding": "full", "load_start": start}
        trained[folder] = run(folder, task, place=str(folder), **options)
    assert not (killed / "start").exists()
    assert len({line["pid"] for line in FileRecorder(killed / "log.jsonl").lines("metrics")}) == 2  # before and after
    weights = last_weights(undisturbed, SHARDED)
    assert_equal_bits(last_weights(killed, SHARDED), weights)
    assert trained[killed].summary["held_out_loss"] == trained[undisturbed].summary["held_out_loss"] > 0
    assert FileRecorder(undisturbed / "log.jsonl").lines("image"), "no preview was shown"
    for entry in trained[killed].entries:
        Store(str(killed)).download(entry.path, tmp_path / "model", Path(entry.path).name)
    average = {name.removeprefix("ema."): tensor for name, tensor in weights.items() if name.startswith("ema.")}
    assert_equal_bits(load_file(tmp_path / "model" / "model.safetensors"), average)
    assert not torch.distributed.is_initialized()
    assert_equal_bits(load_bundle(tmp_path / "model").module.state_dict(), average)


if __name__ == "__main__":
    torch.set_num_threads(1)
    ray.init(address=sys.argv[2], log_to_driver=False)
    place = Path(sys.argv[1])
    (place / "target").write_text(str(os.getpid()))
    run(place, KilledTask, place=str(place))
