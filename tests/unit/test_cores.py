"""Commands that sample give their cores away soon, and say so before torch reads it."""

import os
import subprocess
import sys

import pytest

from pipelines.command.options import SHARED_CORES, share_cores


@pytest.mark.parametrize(
    ("own", "after"), [({}, "1000"), ({"GOMP_SPINCOUNT": "5"}, "5"), ({"OMP_WAIT_POLICY": "active"}, None)]
)
def test_the_users_own_setting_counts(own: dict[str, str], after: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_WAIT_POLICY", *SHARED_CORES):
        monkeypatch.setenv(name, own.get(name, ""))
        if name not in own:
            monkeypatch.delenv(name)
    share_cores()
    assert os.environ.get("GOMP_SPINCOUNT") == after


def test_neither_the_command_line_nor_the_table_of_metrics_loads_torch_before_a_command_runs() -> None:
    program = "import sys, pipelines.command.cli, components.evaluation.metrics; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=120).returncode == 0
