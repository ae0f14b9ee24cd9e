"""A store, MLflow, a network or a recorder is away for minutes: a run leaves the same bytes, and all is delivered."""

import re
import time
from pathlib import Path

import pytest

from pipelines.engine.driver import UNREGISTERED
from tests.conftest import mlflow_process
from tests.faults.conftest import Record, Undisturbed
from tests.faults.runs import INTERVAL, Run, in_mlflow, registered, stopped, wait_until
from tests.outages import How, gate

pytestmark = [pytest.mark.faults, pytest.mark.timeout(2400)]
PROVES = ("components/runtime", "components/data", "components/training", "pipelines/engine")
STEPS, LONGEST = 160, 12 * 60  # seconds
MOMENTS = {
    "data are read": rb"^GET \S*/images/\S+/files/shard-\S+\.tar",
    "a checkpoint is sent": rb"^PUT \S*/base/\S+/train/\S+/step-000000060\S*",
    "an artifact is committed": rb"^PUT \S*/base/[^/]+/manifest\.json",
}
CASES: list[tuple[How, str, int]] = [
    ("refuses", "data are read", 2),
    ("hangs", "a checkpoint is sent", 2),
    ("says 503", "an artifact is committed", 2),
    ("refuses", "a checkpoint is sent", 12),
]


@pytest.mark.parametrize(("how", "moment", "minutes"), CASES)
def test_an_outage_of_minutes_changes_no_byte(
    how: How,
    moment: str,
    minutes: int,
    s3_server: str,
    s3_bucket: str,
    tmp_path: Path,
    undisturbed: Undisturbed,
    record: Record,
):
    run = Run(tmp_path / "run", steps=STEPS, storage=f"{s3_bucket}/runs", max_failures=0)
    with gate(s3_server) as network:
        network.close_at(MOMENTS[moment], 60 * minutes, how)
        run.finish(run.start(AWS_ENDPOINT_URL=network.address), seconds=2000)
        ((_, _, seconds),) = network.closings
    assert seconds >= 60 * minutes
    if how != "hangs":  # in the midst of an upload: the client's own tries, 30 s each, last longer than that
        said = " ".join(run.said().split())
        assert f"store {s3_bucket} away for {minutes - 1}:" in said
        assert ", waiting until 15:00: " in said
        assert f"warning: store {s3_bucket} was away for " in said
    proof = f"no worker lost, {run.same_as(undisturbed(STEPS))}"
    record(f"store {how} for {minutes} minutes while {moment}", 1, proof)


@pytest.mark.parametrize("kind", ["MLflow", "network"])
def test_a_run_shorter_than_an_outage_of_mlflow_is_registered_later_and_a_network_takes_both(
    kind: str, s3_server: str, s3_bucket: str, tmp_path: Path, undisturbed: Undisturbed, record: Record
):
    run = Run(tmp_path / "run", steps=STEPS, storage=f"{s3_bucket}/runs", max_failures=0)
    with mlflow_process(tmp_path) as (server, _), gate(server) as other, gate(s3_server, partner=other) as network:
        if kind == "MLflow":
            other.close_at(rb"^POST \S*/runs/log-batch", LONGEST, "refuses")
        else:
            network.close_at(MOMENTS["a checkpoint is sent"], LONGEST, "refuses")
        driver = run.start(tracking=other.address, AWS_ENDPOINT_URL=network.address)
        driver.wait(2000)
        while not other.closings:  # MLflow is away still
            time.sleep(1)
        how = registered(run, driver, server)
        proof = f"{run.same_as(undisturbed(STEPS))}; {in_mlflow(server, run)}{how}"
    record(f"{kind} refuses for 12 minutes", 1, proof)


def test_a_recorder_that_stands_still_for_twelve_minutes_costs_points_that_are_named_and_no_model(
    tmp_path: Path, undisturbed: Undisturbed, record: Record
):
    run = Run(tmp_path / "run", steps=STEPS, max_failures=0)
    with mlflow_process(tmp_path) as (server, _):
        driver = run.start(tracking=server)
        wait_until(lambda: run.step() >= INTERVAL, run)
        with stopped(driver):
            began = time.monotonic()
            code = driver.wait(LONGEST)
            took = time.monotonic() - began
        assert code == UNREGISTERED
        assert "the run's recorder does not answer" in " ".join(run.said().split())
        same = run.same_as(undisturbed(STEPS))
        run.finish(run.start(tracking=server))
        said = " ".join(run.said().split())
        (lacking,) = re.findall(
            r"base: MLflow lacks (points of .*?):", said
        )  # what it had not taken when it was killed
        assert "model: models:/image-cascade-smoke-base@champion" in said
        proof = (
            f"ended after {took:.0f} s with exit code 3, {same}; said, and lacking after the same command: {lacking}"
        )
    record("recorder stopped for 12 minutes at a checkpoint", 1, proof)
