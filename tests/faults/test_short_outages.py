"""Whole runs whose store, MLflow, recorder or network goes away at four moments, by a clock twenty times as fast."""

import time
from pathlib import Path

import pytest

from components.runtime.storage import outages
from components.runtime.storage.artifact import load_artifact
from tests.conftest import mlflow_process
from tests.faults.conftest import Record, Undisturbed
from tests.faults.runs import IMPATIENT, INTERVAL, Run, in_mlflow, kill_group, registered, stopped, wait_until
from tests.outages import Gate, gate

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1500)]
PROVES = ("components/runtime", "components/data", "components/training", "pipelines/engine")
STEPS = 80
SECONDS, LONGER = 6, 36  # for two minutes and twelve; the longer than the longest pause between two tries
PATIENCE = {"FSSPEC_S3": IMPATIENT, outages.SETTING: "120"}
READ = rb"^GET \S*/images/\S+/files/shard-\S+\.tar"
CHECKPOINT = rb"^PUT \S*/base/\S+/train/\S+/step-000000020\S*"
COMMIT = rb"^PUT \S*/base/[^/]+/manifest\.json"


def close_while_it_trains(network: Gate, run: Run, seconds: float) -> None:
    """An outage through several renewals of the lease."""
    wait_until(lambda: run.step() >= 2 * INTERVAL, run)
    network.close_for(seconds, "refuses")


def test_a_run_waits_for_its_store_says_so_and_leaves_the_same_bytes(
    s3_server: str, s3_bucket: str, tmp_path: Path, undisturbed: Undisturbed, record: Record
):
    run = Run(tmp_path, steps=STEPS, workers=1, storage=f"{s3_bucket}/runs", max_failures=0)
    with gate(s3_server) as network:
        network.close_at(READ, SECONDS, "says 503")
        network.close_at(CHECKPOINT, SECONDS, "hangs")
        network.close_at(COMMIT, SECONDS, "refuses")
        driver = run.start(AWS_ENDPOINT_URL=network.address, **PATIENCE)
        close_while_it_trains(network, run, LONGER)
        run.finish(driver)
        assert not network.planned, network.planned
    assert f"warning: store {s3_bucket} was away for 0:" in " ".join(run.said().split())
    proof = run.same_as(undisturbed(STEPS, workers=1))
    record(f"store away for {SECONDS} s at data, checkpoint and commit, {LONGER} s in the midst of training", 4, proof)


def test_a_head_lost_while_its_store_is_away_costs_no_byte(
    s3_server: str, s3_bucket: str, tmp_path: Path, undisturbed: Undisturbed, record: Record
):
    """The same command comes again before the store is back, so its first look waits."""
    run = Run(tmp_path, steps=STEPS, workers=1, storage=f"{s3_bucket}/runs", max_failures=0)
    with gate(s3_server) as network:
        submitted = PATIENCE | {"AWS_ENDPOINT_URL": network.address, outages.SETTING: "600"}
        driver = run.start(**submitted)
        close_while_it_trains(network, run, 4 * LONGER)  # a driver has to start within it
        kill_group(driver)
        run.log.unlink()
        driver = run.start(**submitted)
        wait_until(lambda: f"store {s3_bucket} away for" in " ".join(run.said().split()), run)
        assert not network.closings, "the store was back before the second job looked"
        run.finish(driver)
        ((_, _, seconds),) = network.closings
    proof = run.same_as(undisturbed(STEPS, workers=1))
    record(f"head killed while its store is away for {seconds:.0f} s, started again meanwhile", 2, proof)


def test_a_run_goes_on_without_mlflow_which_has_everything_once_in_the_end(
    tmp_path: Path, undisturbed: Undisturbed, record: Record
):
    run = Run(tmp_path, steps=STEPS, workers=1, max_failures=0)
    with mlflow_process(tmp_path) as (server, _), gate(server) as network:
        network.close_at(rb"^POST \S*/runs/create", SECONDS, "refuses")
        network.close_at(rb"^POST \S*/runs/log-batch", LONGER, "says 503")
        network.close_at(rb"^PUT \S*/images/", SECONDS, "hangs")
        network.close_at(rb"^POST \S*/model-versions/create", SECONDS, "refuses")
        how = registered(run, run.start(tracking=network.address), network.address)
        assert not network.planned, network.planned
        proof = f"{run.same_as(undisturbed(STEPS, workers=1))}; {in_mlflow(server, run)}{how}"
    record(f"MLflow away for {SECONDS} s at run, image and model, {LONGER} s at points", 4, proof)


def test_a_network_that_is_away_takes_store_and_mlflow_with_it_and_nothing_is_lost(
    s3_server: str, s3_bucket: str, tmp_path: Path, undisturbed: Undisturbed, record: Record
):
    run = Run(tmp_path, steps=STEPS, workers=1, storage=f"{s3_bucket}/runs", max_failures=0)
    with mlflow_process(tmp_path) as (server, _), gate(server) as other, gate(s3_server, partner=other) as network:
        network.close_at(READ, SECONDS, "refuses")
        network.close_at(CHECKPOINT, SECONDS, "refuses")
        network.close_at(COMMIT, SECONDS, "hangs")
        driver = run.start(tracking=other.address, AWS_ENDPOINT_URL=network.address, **PATIENCE)
        close_while_it_trains(network, run, LONGER)
        how = registered(run, driver, other.address)
        assert len(other.closings) == 4, other.closings
        proof = f"{run.same_as(undisturbed(STEPS, workers=1))}; {in_mlflow(server, run)}{how}"
    record(f"network away for {SECONDS} s at data, checkpoint and commit, {LONGER} s while training", 4, proof)


def test_a_recorder_that_stands_still_holds_up_no_training_and_loses_nothing(
    tmp_path: Path, undisturbed: Undisturbed, record: Record
):
    run = Run(tmp_path, steps=STEPS, workers=1, max_failures=0)
    with mlflow_process(tmp_path) as (server, _):
        driver = run.start(tracking=server)
        for moment, seconds in (
            (lambda: "images" in run.stages(), SECONDS),
            (lambda: run.step() >= INTERVAL, SECONDS),
            (lambda: run.step() >= 2 * INTERVAL, LONGER),
            (lambda: load_artifact(run.stage("base")) is not None, SECONDS),
        ):
            wait_until(moment, run)
            with stopped(driver):
                time.sleep(seconds)
        run.finish(driver)
        proof = f"{run.same_as(undisturbed(STEPS, workers=1))}; {in_mlflow(server, run)}"
    record(f"recorder stopped for {SECONDS} s at data, checkpoint and end, {LONGER} s while training", 4, proof)
