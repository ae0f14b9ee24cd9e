"""A copy as in a container: the packages' files, no `.git`, and no git on the path."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.warm_workers import warm_environment

REPOSITORY = Path(__file__).parents[2]
RECIPE = ["--recipe", "smoke", "--set", "images.limit=40", "--until", "images"]


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("copy")
    command = ["git", "ls-files", "components", "pipelines", "pyproject.toml"]
    for name in subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, text=True).stdout.splitlines():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(REPOSITORY / name, folder / name)
    return folder


def test_a_run_ends_well_and_names_version_and_source(copy: Path) -> None:
    """Its workers are forked from a process that has imported libraries alone."""
    warm = warm_environment("libraries")
    environment = {name: value for name, value in os.environ.items() if name != "CASCADE_COMMIT"} | warm
    environment |= {"PATH": str(Path(sys.executable).parent), "PYTHONPATH": f"{warm['PYTHONPATH']}:{copy}"}
    assert shutil.which("git", path=environment["PATH"]) is None
    command = [sys.executable, "pipelines/full_cascade.py", *RECIPE]
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (code,) = [line.removeprefix("code: ") for line in done.stdout.splitlines() if line.startswith("code: ")]
    package, version, source = code.replace(",", "").split()
    assert (package, version) == ("image-cascade", "0.1.0")
    assert source.startswith("source:")
    (manifest,) = (copy / "runs" / "stages" / "images").glob("*/manifest.json")
    assert json.loads(manifest.read_text())["provenance"]["git_commit"] == source
    (report,) = (copy / "runs" / "runs").glob("*/report.html")
    assert code in report.read_text()
