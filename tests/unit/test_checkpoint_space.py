"""Laws of room: a disk without room for the checkpoints is refused before anything starts, and nothing else is."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from components.configuration.conditions import DatasetInfo
from components.runtime.storage.connection import StoreError
from components.runtime.storage.store import Store
from pipelines.engine import driver
from pipelines.engine.driver import RunOptions, prepare
from pipelines.planning.memory import MANY_CLASSES, checkpoint_bytes, model_bytes, step_model
from pipelines.planning.preflight import space_of
from pipelines.planning.room import check_room
from pipelines.recipes.catalog import RECIPES
from pipelines.workflow import PlannedStage
from pipelines.workflows import build_workflow
from tests.in_process import in_process
from tests.refusals import assert_refused


def disks(monkeypatch: pytest.MonkeyPatch, *, free: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))


def test_a_disk_with_room_is_passed_and_one_without_is_said_with_what_is_needed_and_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    disks(monkeypatch, free=5_000_000)
    check_room({str(tmp_path / "not" / "yet"): 5_000_000, "memory://a": 1}, purpose="checkpoints")
    with pytest.raises(StoreError) as caught:
        check_room({str(tmp_path / "not" / "yet"): 5_200_000}, purpose="checkpoints")
    said = str(caught.value)
    assert said.startswith(f"checkpoints need 5.2 MB in {tmp_path}/not/yet, where 5.0 MB are free; make room")
    assert "\n" not in said
    disks(monkeypatch, free=0)
    check_room({"memory://there": 10**15, "s3://bucket/there": 10**15, str(tmp_path): 0}, purpose="checkpoints")
    disks(monkeypatch, free=100)
    with pytest.raises(StoreError, match=f"need 120 bytes in {tmp_path}/a and {tmp_path}/b, where 100 bytes are free"):
        check_room({str(tmp_path / "a"): 60, str(tmp_path / "b"): 60}, purpose="checkpoints")


def test_what_an_earlier_try_left_counts_as_room(tmp_path: Path):
    prepared = prepare(RunOptions(recipe="smoke", storage=str(tmp_path), tracking="none", until="tokenizer"))
    needed = space_of(prepared.workflow, prepared.planned)
    assert needed.trainings == ("tokenizer",)
    (entry,) = [entry for entry in prepared.planned if entry.stage.name == "tokenizer"]
    entry.store.write("train/step-000000040/weights.safetensors", bytes(3_000_000))
    assert space_of(prepared.workflow, prepared.planned).storage == needed.storage - 3_000_000
    assert Store(str(tmp_path)).exists(f"stages/tokenizer/{entry.key}/train/step-000000040/weights.safetensors")


@pytest.mark.parametrize("average", ["exponential", "power"])
def test_a_node_has_room_for_one_checkpoint_of_a_training_or_for_its_model_with_all_snapshots(
    average: str, tmp_path: Path
):
    settings = [f"base.ema={average}", "base.checkpoint_every=2"]
    options = RunOptions(recipe="smoke", set=settings, storage=str(tmp_path), tracking="none", until="base")
    prepared = prepare(options)
    needed = space_of(prepared.workflow, prepared.planned)
    (base,) = [entry.stage.config for entry in prepared.planned if entry.stage.name == "base"]
    model = step_model(base, DatasetInfo(num_classes=MANY_CLASSES, vocab_size=300, text_length=12))
    checkpoint, finished = checkpoint_bytes(model), model_bytes(model)
    assert (finished > checkpoint) == (average == "power")
    assert needed == (3 * checkpoint + finished, max(checkpoint, finished), ("base",))


@pytest.mark.parametrize(("recipe", "other"), [("autoguidance", "weaker"), ("classifier_guided", "classifier")])
def test_a_node_has_room_for_all_that_train_at_once_after_a_common_first_training(recipe: str, other: str):
    workflow = build_workflow(RECIPES[recipe]())

    def room(*names: str) -> int:
        stages = workflow.stages
        planned = [PlannedStage(s, "key", Store("memory://room"), None, s.name in names, {}) for s in stages]
        return space_of(workflow, planned).temporary

    assert room("base", other) == room("base") + room(other)
    assert room("autoencoder", "base") == max(room("autoencoder"), room("base"))  # one after the other


def test_a_full_disk_ends_the_command_in_one_line_before_ray_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    disks(monkeypatch, free=20_000_000)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(driver, "start_ray", lambda **options: pytest.fail("Ray was started"))
    done = in_process("run", "--recipe", "smoke", "--tracking", "none", cwd=tmp_path)
    needed = "error: the checkpoints of tokenizer, prior, base, upsampler_32 need "
    assert_refused(done, needed, f"in {tmp_path}/runs and ", "where 20.0 MB are free")
    assert not list(tmp_path.glob("runs/stages/*"))
