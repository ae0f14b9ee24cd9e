"""Secrets that stand in the environment are used, and written down nowhere: not in what is printed, stored, tracked or
logged by Ray. Files that a run leaves on this machine are readable by no one else where they hold a token.
"""

import stat
from pathlib import Path

from tests.integration.conftest import IN_ADDRESS, SECRETS, Run, read_folder


def is_private(path: Path, root: Path) -> bool:
    """Whether the file, or a folder on the way to it, is its owner's alone."""
    return any(not place.stat().st_mode & 0o077 for place in (path, *path.parents) if place.is_relative_to(root))


def leaks(files: dict[str, bytes]) -> list[str]:
    hidden = {**SECRETS, "the address": IN_ADDRESS}
    return [
        f"{kind} in {name}"
        for name, data in files.items()
        for kind, secret in hidden.items()
        if secret.encode() in data
    ]


def test_the_run_left_something_to_look_at(gan_run: Run) -> None:
    assert any(name.endswith("manifest.json") for name in gan_run.files)
    assert any(name.endswith("report.html") for name in gan_run.files)
    assert len(gan_run.tracked) > 3
    assert any(Path(name).suffix == ".log" for name in read_folder(gan_run.ray))


def test_nothing_that_is_printed_holds_a_secret(gan_run: Run) -> None:
    assert leaks({"output": gan_run.printed.encode()}) == []


def test_no_manifest_report_or_other_stored_file_holds_a_secret(gan_run: Run) -> None:
    assert leaks(gan_run.files) == []


def test_nothing_in_mlflow_holds_a_secret(gan_run: Run) -> None:
    assert leaks(gan_run.tracked) == []


def test_no_log_and_no_local_file_holds_a_secret(gan_run: Run) -> None:
    assert leaks(read_folder(gan_run.ray)) == []
    readable = {
        name: data for name, data in read_folder(gan_run.folder).items() if not is_private(Path(name), gan_run.folder)
    }
    assert leaks(readable) == []


def test_a_token_is_readable_by_its_owner_alone(gan_run: Run) -> None:
    token = Path.home() / ".ray" / "auth_token"
    assert not token.exists() or stat.S_IMODE(token.stat().st_mode) == 0o600
