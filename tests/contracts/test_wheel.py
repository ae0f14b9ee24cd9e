"""What `pip install` puts on a machine: one package, whose parts are the checkout's two folders."""

import ast
import json
import re
import subprocess
import sys
import tarfile
import textwrap
import zipfile
from pathlib import Path

import pytest

from pipelines.engine.provenance import COMMIT, commit

MODULE_NAME = re.compile(r"(components|pipelines)(\.\w+)*\.[a-z_]\w*(:\w+)?")
SAME = """
    import importlib, json, pickle, pkgutil, sys
    import image_cascade
    assert "torch" not in sys.modules
    names = [
        info.name
        for root in ("components", "pipelines")
        for info in pkgutil.walk_packages(importlib.import_module(f"image_cascade.{root}").__path__, f"{root}.")
    ]
    for name in names:
        second = importlib.import_module(f"image_cascade.{name}")
        first = importlib.import_module(name)
        assert second is first, name
        assert first.__name__ == first.__spec__.name == name
    from image_cascade.components.sampling.requests import Request
    assert b"image_cascade" not in pickle.dumps(Request())
    for name in ("image_cascade.components.nothing", "image_cascade.nothing"):
        assert importlib.util.find_spec(name) is None
    print(json.dumps(names))
"""


def build(source: Path, target: str, out: Path) -> Path:
    command = [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(out)]
    built = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    (path,) = out.iterdir()
    return path


@pytest.fixture(scope="module")
def wheel(repository, tmp_path_factory):
    return zipfile.ZipFile(build(repository, "wheel", tmp_path_factory.mktemp("wheel")))


@pytest.fixture(scope="module")
def modules(wheel) -> dict[str, str]:
    """Path in the wheel -> text."""
    return {name: wheel.read(name).decode() for name in wheel.namelist() if name.endswith(".py")}


def test_the_wheel_holds_one_package_with_every_tracked_file_and_nothing_else(wheel, repository, tracked_files):
    folders = {name.partition("/")[0] for name in wheel.namelist()}
    assert {folder for folder in folders if not folder.endswith(".dist-info")} == {"image_cascade"}
    inside = {name.split("/")[1] for name in wheel.namelist() if name.startswith("image_cascade/")}
    assert inside == {"__init__.py", "py.typed", "components", "pipelines", COMMIT}
    names = [path.relative_to(repository).as_posix() for path in tracked_files]
    ours = {f"image_cascade/{name}" for name in names if name.startswith(("components/", "pipelines/"))}
    assert not ours - {*wheel.namelist()}


def test_a_wheel_says_of_which_commit_it_is_also_one_of_a_source_distribution(wheel, repository, tmp_path):
    """As `python -m build` makes it: there is no .git in between."""
    sdist, unpacked = build(repository, "sdist", tmp_path / "sdist"), tmp_path / "unpacked"
    with tarfile.open(sdist) as archive:
        archive.extractall(unpacked, filter="data")
    (source,) = unpacked.iterdir()
    for each in (wheel, zipfile.ZipFile(build(source, "wheel", tmp_path / "wheel"))):
        assert each.read(f"image_cascade/{COMMIT}").decode().strip() == commit(repository)


def test_its_modules_import_each_other_by_the_package_keep_their_lines_and_name_none_of_the_checkout(
    modules, repository
):
    """A text that names a module by its place in the checkout would name nothing here; it follows from `__name__`."""

    def imports(text: str) -> set[str]:
        nodes = list(ast.walk(ast.parse(text)))
        names = {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
        return names | {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}

    for path, text in modules.items():
        constants = [node.value for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant)]
        texts = [value for value in constants if isinstance(value, str) and MODULE_NAME.fullmatch(value)]
        assert not texts, f"{path}: {texts}"
        assert not [name for name in imports(text) if name.split(".")[0] in ("components", "pipelines")], path
        checkout = repository / path.removeprefix("image_cascade/")
        if checkout.is_file():
            assert len(text.splitlines()) == len(checkout.read_text().splitlines()), path


def test_the_wheel_brings_the_command_the_licence_and_a_readme_without_links_into_the_repository(wheel):
    (entry_points,) = [name for name in wheel.namelist() if name.endswith("entry_points.txt")]
    assert "cascade = image_cascade.pipelines.command.cli:main" in wheel.read(entry_points).decode()
    assert any(name.endswith("licenses/LICENSE") for name in wheel.namelist())
    (name,) = [name for name in wheel.namelist() if name.endswith("METADATA")]
    headers, _, text = wheel.read(name).decode().partition("\n\n")
    assert "Description-Content-Type: text/markdown" in headers
    assert text.startswith("# image-cascade")
    links = re.findall(r"\]\(([^)]*)\)", text)
    assert links
    assert all(link.startswith("https://") for link in links)


def test_in_the_editable_install_the_package_is_a_second_name_of_the_same_modules(tmp_path):
    command = [sys.executable, "-c", textwrap.dedent(SAME)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {"components.models.unet", "pipelines.command.cli"} <= set(json.loads(done.stdout.splitlines()[-1]))
