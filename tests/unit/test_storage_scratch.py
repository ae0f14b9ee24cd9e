"""Scratch folders of a node: gone when their work ends, also where it ends by a kill."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from components.runtime.storage.scratch import SCRATCH, held_folder, scratch_folder

HOLDER = """
import sys
from pathlib import Path
from components.runtime.storage.scratch import held_folder, scratch_folder

given = [Path(name) for name in sys.argv[1:]]
with held_folder(given[0]) if given else scratch_folder("checkpoint") as folder:
    (folder / "weights").write_bytes(b"large")
    print(folder, flush=True)
    sys.stdin.read()
"""


class Holder:
    """A process that works in a scratch folder until it is ended."""

    def __init__(self, *given: Path) -> None:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        command = [sys.executable, "-c", HOLDER, *map(str, given)]
        environment = os.environ | {"TMPDIR": tempfile.gettempdir()}
        self.process = subprocess.Popen(command, text=True, env=environment, **pipes)
        self.folder = Path(self.process.stdout.readline().strip())

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def end(self) -> None:
        self.process.communicate()


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The node's temporary folder."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_a_folder_is_gone_after_its_work_and_after_a_failure(temporary: Path) -> None:
    with scratch_folder("images") as folder:
        (folder / "a").write_bytes(b"a")
        assert folder.parent == temporary
        assert folder.stat().st_mode & 0o777 == 0o700
    with pytest.raises(ZeroDivisionError), scratch_folder("images"):
        raise ZeroDivisionError
    assert not [*temporary.iterdir()]


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_holds_is_not(temporary: Path) -> None:
    killed, living = Holder(), Holder()
    try:
        killed.kill()
        assert (killed.folder / "weights").exists()
        with scratch_folder("next"):
            assert not killed.folder.exists()
            assert (living.folder / "weights").read_bytes() == b"large"
    finally:
        living.end()
    assert not [*temporary.iterdir()]


def test_a_folder_of_several_processes_stays_while_one_of_them_lives(temporary: Path) -> None:
    shared = temporary / f"{SCRATCH}restore-1"
    one, other = Holder(shared), Holder(shared)
    try:
        one.kill()
        with scratch_folder("next"):
            assert (shared / "weights").exists()
        other.kill()
        with scratch_folder("next"):
            assert not shared.exists()
    finally:
        other.kill()


def test_no_link_is_followed_and_no_other_folder_touched(temporary: Path) -> None:
    (temporary / "mine").mkdir()
    (temporary / "mine" / "file").write_bytes(b"mine")
    (temporary / f"{SCRATCH}link").symlink_to(temporary / "mine")
    (temporary / f"{SCRATCH}link.1.lock").touch()
    with scratch_folder("next"), held_folder(temporary / f"{SCRATCH}own"):
        assert (temporary / "mine" / "file").read_bytes() == b"mine"
