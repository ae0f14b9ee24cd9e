"""What a process of Ray on the head imports: torch takes a quarter of a gigabyte, once for each training."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    "module",
    [
        "components.training.ordered_shards",
        "components.data.stream",
        "pipelines.engine.recorder",
        "components.serving.deployment",
        "components.serving.middleware",
    ],
)
def test_an_actor_on_the_head_imports_no_torch(module: str):
    program = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
