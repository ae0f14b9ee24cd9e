"""Stores that are not Amazon's: smoke to its end, drivers that race, a driver killed and started again."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import s3fs

from components.runtime.storage.garbage import find_garbage
from components.runtime.storage.store import Store
from tests.emulators import in_environment, new_bucket, swift_server
from tests.faults.conftest import Record, Undisturbed
from tests.faults.runs import CASCADE, DEADLINE, INTERVAL, Run, kill_group, race, wait_until

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1500)]
PROVES = ("components/runtime/storage", "components/runtime/tracking", "pipelines/engine/execute.py")
STEPS = 160
STORES = {"gs": "Google's emulator", "az": "Azurite", "swift": "OpenStack Swift"}


@pytest.fixture(scope="module")
def swift(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with swift_server(tmp_path_factory.mktemp("swift")) as settings, in_environment(settings):
        s3fs.S3FileSystem.clear_instance_cache()
        yield
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def swift_bucket(swift: None) -> str:
    """URL of a new bucket."""
    return new_bucket("s3")


@pytest.fixture(params=STORES)
def storage(request: pytest.FixtureRequest) -> str:
    return f"{request.getfixturevalue(f'{request.param}_bucket')}/runs"


@pytest.fixture
def named(request: pytest.FixtureRequest) -> str:
    return STORES[request.node.callspec.params["storage"]]


def test_smoke_runs_to_its_end(storage: str, named: str, tmp_path: Path, record: Record):
    """Every stage; then nothing is left to do, every file is as it was written, and no garbage stays."""
    smoke = ["run", "--recipe", "smoke", "--storage", storage, "--tracking", "none"]
    assert f"report: {storage}" in " ".join(command(smoke, tmp_path).split())
    made = Store(storage).list("stages")
    command(smoke, tmp_path)
    assert Store(storage).list("stages") == made, "what is finished was made again"
    assert "all as their manifests say" in command(["verify", "--storage", storage], tmp_path)
    command(["gc", "--yes", "--storage", storage], tmp_path)
    assert find_garbage(Store(storage)) == []
    assert "all as their manifests say" in command(["verify", "--storage", storage], tmp_path)
    record(f"{named}: smoke to its end, again, verify, gc", 1, f"{len(made)} files, none made again, all whole")


def test_drivers_that_race_do_each_stage_once(
    storage: str, named: str, tmp_path: Path, undisturbed: Undisturbed, record: Record
):
    run = Run(tmp_path / "run", steps=STEPS, storage=storage)
    race(run, [run.start(), run.start()])
    proof = f"one attempt, {run.same_as(undisturbed(STEPS))}"
    record(f"{named}: 2 drivers race, kill -9 of the one that works", 1, proof)


def test_a_driver_killed_goes_on_where_it_was(
    storage: str, named: str, tmp_path: Path, undisturbed: Undisturbed, record: Record
):
    run = Run(tmp_path / "run", steps=STEPS, storage=storage)
    driver = run.start()
    wait_until(lambda: run.step() >= INTERVAL, run)
    kill_group(driver)
    reached = run.step()
    assert INTERVAL <= reached < STEPS
    run.finish(run.start())
    record(
        f"{named}: kill -9 of driver and Ray, run again", 1, f"from step {reached}, {run.same_as(undisturbed(STEPS))}"
    )


def command(arguments: list[str], place: Path) -> str:
    """What a command says that succeeds."""
    done = subprocess.run([CASCADE, *arguments], cwd=place, capture_output=True, text=True, timeout=DEADLINE)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-4000:]
    assert "Traceback" not in said
    return said
