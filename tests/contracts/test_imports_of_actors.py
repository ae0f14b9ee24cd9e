"""What answers at once, and what a process of Ray on the head imports: torch takes a quarter of a gigabyte, once for
each training, and seconds."""

import subprocess
import sys

PROGRAM = """
import importlib, sys
from typer.testing import CliRunner
from pipelines.command.cli import app

assert CliRunner().invoke(app, ["run", "--help"]).exit_code == 0
assert "torch" not in sys.modules, "run --help"
for module in sys.argv[1:]:
    importlib.import_module(module)
    assert "torch" not in sys.modules, module
"""
MODULES = (
    "pipelines.command.data",
    "components.data.stream",
    "pipelines.engine.recorder",
    "components.serving.deployment",
    "components.serving.middleware",
)


def test_an_actor_on_the_head_and_what_answers_at_once_import_no_torch():
    done = subprocess.run([sys.executable, "-c", PROGRAM, *MODULES], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
