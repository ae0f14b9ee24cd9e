"""Laws of what a run says of its code: its commit where there is one, else a digest of the source; never an error."""

import os
import subprocess
from pathlib import Path

import pytest

from pipelines.engine.provenance import COMMIT, VARIABLE, code_line, commit, short, version

IDENTITY = {f"GIT_{who}_{what}": "a@b" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}


def git(folder: Path, *arguments: str) -> str:
    environment = os.environ | IDENTITY
    command = ["git", "-c", "init.defaultBranch=main", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True, text=True).stdout


@pytest.fixture(autouse=True)
def _without_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Folder of the packages, in no repository."""
    root = tmp_path / "source"
    for package in ("components", "pipelines"):
        (root / package).mkdir(parents=True)
        (root / package / "__init__.py").write_text("VALUE = 1\n")
    return root


@pytest.fixture
def checkout(source: Path) -> Path:
    git(source, "init")
    git(source, "add", ".")
    git(source, "commit", "-m", "first")
    return source


def test_a_checkout_names_its_commit_and_whether_its_code_differs(checkout: Path) -> None:
    head = git(checkout, "rev-parse", "HEAD").strip()
    (checkout / "mine.yaml").write_text("name: mine\n")
    assert commit(checkout) == head
    (checkout / "components" / "new.py").write_text("")
    assert commit(checkout) == f"{head}+changes"
    git(checkout, "add", ".")
    git(checkout, "commit", "-m", "second")
    assert commit(checkout) == git(checkout, "rev-parse", "HEAD").strip() != head
    (checkout / "pipelines" / "__init__.py").write_text("VALUE = 2\n")
    assert commit(checkout).endswith("+changes")


def test_git_is_asked_of_this_folder_whatever_a_hook_set(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    head = git(checkout, "rev-parse", "HEAD").strip()
    monkeypatch.setenv("GIT_DIR", str(Path(__file__).parents[2] / ".git"))
    monkeypatch.setenv("GIT_WORK_TREE", str(checkout))
    assert commit(checkout) == head


def test_somebody_else_s_repository_around_it_is_not_named(source: Path) -> None:
    around = source.parent
    git(around, "init")
    git(around, "add", ".")
    git(around, "commit", "-m", "theirs")
    assert commit(source).startswith("source:")


def test_without_git_the_source_is_named(checkout: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    before = commit(checkout)
    assert before.startswith("source:")
    assert commit(checkout) == before
    (checkout / "components" / "__init__.py").write_text("VALUE = 2\n")
    assert commit(checkout) != before


def test_a_repository_without_a_commit_ends_nothing(source: Path) -> None:
    git(source, "init")
    assert commit(source).startswith("source:")


def test_an_image_and_a_wheel_say_what_their_build_knew(source: Path) -> None:
    (source / COMMIT).write_text("\n")  # built without the argument
    assert commit(source).startswith("source:")
    (source / COMMIT).write_text("abc123\n")
    assert commit(source) == "abc123"


def test_an_upload_says_what_its_variable_says(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "abc123+changes")
    assert commit(source) == "abc123+changes"


def test_a_line_names_package_version_and_twelve_digits() -> None:
    assert short("0123456789abcdef0123456789abcdef01234567+changes") == "0123456789ab+changes"
    assert short("source:0123456789ab") == "source:0123456789ab"
    assert code_line("0" * 40) == f"image-cascade {version()}, 000000000000"
