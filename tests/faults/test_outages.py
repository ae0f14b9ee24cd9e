"""A store that is away for minutes at a moment of a run: the run waits, says so, and ends with the same bytes."""

from pathlib import Path

import pytest

from tests.faults.conftest import Record, Undisturbed
from tests.faults.runs import Run
from tests.outages import How, gate

pytestmark = [pytest.mark.faults, pytest.mark.timeout(2400)]
PROVES = ("components/runtime/storage", "components/data", "components/training", "pipelines/engine/execute.py")
STEPS = 160
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
    said = " ".join(run.said().split())
    assert f"store {s3_bucket} away for {minutes - 1}:" in said
    assert ", waiting until 15:00: " in said
    assert f"warning: store {s3_bucket} was away for " in said
    proof = f"no worker lost, {run.same_as(undisturbed(STEPS))}"
    record(f"store {how} for {minutes} minutes while {moment}", 1, proof)
