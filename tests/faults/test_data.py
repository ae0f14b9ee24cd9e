"""Files that are damaged at rest, and disks that are full: found, named, and made good where it can be."""

import os
from pathlib import Path

import pytest
from rich.console import Console

from components.runtime.storage.store import Store
from components.training.checkpoint import part_file
from components.training.run_folder import last_checkpoint
from pipelines.command.upkeep import verify_run
from tests.faults.conftest import Record, Undisturbed
from tests.faults.runs import INTERVAL, Run, fill, kill_group, small_disk, wait_until

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]
PROVES = ("components/data", "components/runtime/storage", "components/training")
STEPS = 160


def change_a_bit(store: Store, path: str) -> None:
    data = bytearray(store.read(path))
    data[len(data) // 2] ^= 1
    store.write(path, bytes(data))


def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path: Path, undisturbed: Undisturbed, record: Record):
    run = Run(tmp_path, steps=STEPS)
    driver = run.start()
    wait_until(lambda: run.step() >= 3 * INTERVAL, run)
    kill_group(driver)
    checkpoint = last_checkpoint(run.train())
    assert checkpoint is not None
    change_a_bit(run.train(), f"{checkpoint.name}/{part_file(0, 1)}")
    run.finish(run.start())
    assert "a checkpoint is damaged" in run.said()
    assert f"{checkpoint.name}/{part_file(0, 1)} differs" in run.said()
    record("one bit of the last checkpoint changed", 1, run.same_as(undisturbed(STEPS)))


def test_a_damaged_shard_stops_training_until_it_is_whole_again(
    tmp_path: Path, undisturbed: Undisturbed, record: Record
):
    run = Run(tmp_path, steps=STEPS, workers=1)
    run.finish(run.start(until="images"))
    shards = run.stage("images")
    name = next(file.path for file in shards.list() if file.path.endswith("000001.tar"))
    whole = shards.read(name)
    shards.write(name, whole[:-1024])
    run.fail(run.start(), saying=f"differs: it has {len(whole) - 1024} bytes")
    shards.write(name, whole)
    change_a_bit(shards, name)
    run.fail(run.start(), saying="sha256")
    assert verify_run(None, storage=run.storage, console=Console(quiet=True)) == 1
    shards.write(name, whole)
    run.finish(run.start())
    assert verify_run(None, storage=run.storage, console=Console(quiet=True)) == 0
    proof = f"refused, and whole again: {run.same_as(undisturbed(STEPS, workers=1))}"
    record("shard truncated", 1, proof)
    record("one bit of a shard changed", 1, proof)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts a small disk")
def test_a_full_disk_stops_the_run_and_the_same_command_goes_on(
    tmp_path: Path, undisturbed: Undisturbed, record: Record
):
    """The disk is a tmpfs of its own; it is full between two checkpoints, and has room again afterwards."""
    disk = tmp_path / "disk"
    with small_disk(disk, megabytes=64):
        run = Run(tmp_path, steps=STEPS, storage=str(disk / "runs"), max_failures=1)
        driver = run.start()
        wait_until(lambda: run.step() >= INTERVAL, run)
        ballast = fill(disk)
        run.fail(driver, saying="make room there")
        ballast.unlink()
        run.finish(run.start())
        record("disk full (a tmpfs of 64 MB)", 1, f"stopped, went on: {run.same_as(undisturbed(STEPS))}")
