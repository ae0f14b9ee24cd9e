"""Everything that an S3 server and the network before it can do, while a workflow runs: it ends with the same bytes."""

from pathlib import Path

import pytest

from tests.conftest import through_faults
from tests.faults.conftest import Record, Undisturbed
from tests.faults.proxy import FAULTS, counted
from tests.faults.runs import IMPATIENT, Run
from tests.racing_drivers import race

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]
PROVES = ("components/runtime/storage",)
STEPS = 160
SEED = 20261


def test_a_workflow_on_a_bad_network_ends_with_the_same_bytes(
    s3_server: str, s3_bucket: str, tmp_path: Path, undisturbed: Undisturbed, record: Record
):
    log = tmp_path / "faults.jsonl"
    run = Run(tmp_path / "run", steps=STEPS, storage=f"{s3_bucket}/runs")
    with through_faults(s3_server, log, seed=SEED, gap=(3, 9), hang=4.0) as endpoint:
        run.finish(run.start(AWS_ENDPOINT_URL=endpoint, FSSPEC_S3=IMPATIENT))
    hashes = run.hashes()
    assert hashes == undisturbed(STEPS)
    counts = counted(log)
    for kind in ("read", "write"):
        missing = set(FAULTS) - {fault for where, fault in counts if where == kind}
        assert not missing, f"never injected while {kind}ing: {missing}"
    for (kind, fault), times in sorted(counts.items()):
        record(f"{kind}: {fault}", times, f"same shards {hashes['images'][:8]}…, weights {hashes['base'][:8]}…")


def test_four_drivers_lose_no_commit_in_ten_thousand_steps(record: Record):
    counts = race(10_800, seed=SEED)
    assert counts["steps"] >= 10_000
    hurt = ("request refused", "request lost", "driver killed", "clock set", "bit changed")
    said = f"{counts['steps']} steps, {counts['request ok']} requests, {counts['lease taken']} leases: no commit lost"
    for fault in hurt:
        record(f"four drivers in one process: {fault}", counts[fault], f"{said} or made twice, no damage adopted")
