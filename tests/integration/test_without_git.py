"""A copy as in a container: the packages' files, no `.git`, and no git on the path."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

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


def printed(copy: Path, *command: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "CASCADE_COMMIT"}
    environment |= {"PATH": str(Path(sys.executable).parent), "PYTHONPATH": str(copy)}
    assert shutil.which("git", path=environment["PATH"]) is None
    done = subprocess.run([sys.executable, *command], cwd=copy, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_run_ends_well_and_names_version_and_source(copy: Path) -> None:
    lines = printed(copy, "pipelines/full_cascade.py", *RECIPE).splitlines()
    (code,) = [line.removeprefix("code: ") for line in lines if line.startswith("code: ")]
    package, version, source = code.replace(",", "").split()
    assert (package, version) == ("image-cascade", "0.1.0")
    assert source.startswith("source:")
    (manifest,) = (copy / "runs" / "stages" / "images").glob("*/manifest.json")
    assert json.loads(manifest.read_text())["provenance"]["git_commit"] == source
    (report,) = (copy / "runs" / "runs").glob("*/report.html")
    assert code in report.read_text()
    assert printed(copy, "pipelines/full_cascade.py", "--plan", *RECIPE).rstrip().endswith(f"code: {code}")
