"""A whole run whose store goes away while data are read, a checkpoint is sent and an artifact is committed."""

from pathlib import Path

import pytest

from components.runtime.storage import outages
from tests.faults.conftest import Record
from tests.faults.runs import Run
from tests.outages import gate

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1500)]
PROVES = ("components/runtime/storage", "components/data", "components/training", "pipelines/engine/execute.py")
STEPS = 40
SECONDS = 6
LONGER = 25  # than the longest pause between two tries, after which the wait is said
# Of a store that hangs; the requests' own tries are those of the product.
IMPATIENT = '{"config_kwargs": {"read_timeout": 2, "retries": {"mode": "standard", "max_attempts": 3}}}'


def test_a_run_waits_for_its_store_says_so_and_leaves_the_same_bytes(
    s3_server: str, s3_bucket: str, tmp_path: Path, record: Record
):
    whole = Run(tmp_path / "whole", steps=STEPS, workers=1)
    whole.finish(whole.start())
    run = Run(tmp_path / "run", steps=STEPS, workers=1, storage=f"{s3_bucket}/runs", max_failures=0)
    with gate(s3_server) as network:
        network.close_at(rb"^GET \S*/images/\S+/files/shard-\S+\.tar", SECONDS, "says 503")
        network.close_at(rb"^PUT \S*/base/\S+/train/\S+/step-000000020\S*", SECONDS, "hangs")
        network.close_at(rb"^PUT \S*/base/[^/]+/manifest\.json", LONGER, "refuses")
        settings = {"AWS_ENDPOINT_URL": network.address, "FSSPEC_S3": IMPATIENT, outages.SETTING: "120"}
        run.finish(run.start(**settings))
        assert not network.planned, network.planned
    assert f"warning: store {s3_bucket} was away for 0:" in " ".join(run.said().split())
    record("store away for 6, 6 and 25 s: data, checkpoint, commit", 3, run.same_as(whole.hashes()))
