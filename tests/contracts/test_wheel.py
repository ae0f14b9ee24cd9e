"""What `pip install` puts on a machine."""

import subprocess
import sys
import zipfile

import pytest


@pytest.fixture(scope="module")
def wheel(repository, tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)]
    built = subprocess.run(command, cwd=repository, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    (path,) = out.glob("*.whl")
    return zipfile.ZipFile(path)


def test_the_wheel_holds_the_two_packages_and_nothing_else(wheel):
    folders = {name.partition("/")[0] for name in wheel.namelist()}
    assert {folder for folder in folders if not folder.endswith(".dist-info")} == {"components", "pipelines"}


def test_the_wheel_holds_every_tracked_file_of_the_packages(wheel, repository, tracked_files):
    inside = [path.relative_to(repository).as_posix() for path in tracked_files]
    packed = set(wheel.namelist())
    assert not [name for name in inside if name.startswith(("components/", "pipelines/")) and name not in packed]


def test_the_wheel_brings_the_command_and_the_licence(wheel):
    (entry_points,) = [name for name in wheel.namelist() if name.endswith("entry_points.txt")]
    assert "cascade = pipelines.cli:main" in wheel.read(entry_points).decode()
    assert any(name.endswith("licenses/LICENSE") for name in wheel.namelist())
