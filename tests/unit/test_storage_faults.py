"""Laws of storage on a bad network and a full disk: the bytes arrive, or one clear line says why not."""

import errno
import resource
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import ClassVar
from unittest.mock import Mock

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from components.runtime.storage import connection
from components.runtime.storage.artifact import Artifact, commit_artifact, describe, verify_files
from components.runtime.storage.connection import retried
from components.runtime.storage.store import DamagedFileError, Store, StoreError, digest_of


class Cutting(MemoryFileSystem):
    """Loses the last byte of what it is sent, so many times, and says that all went well."""

    protocol = "cutting"
    store: ClassVar[dict[str, object]] = {}
    cuts = 0

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **options: object) -> None:
        cut, type(self).cuts = self.cuts > 0, self.cuts - 1
        super().pipe_file(path, value[:-1] if cut else value, mode, **options)

    def put_file(self, lpath: str, rpath: str, **options: object) -> None:
        self.pipe_file(rpath, Path(lpath).read_bytes())


@pytest.mark.parametrize("send", ["write", "upload"])
def test_a_file_that_arrives_cut_is_sent_again_and_is_no_success_if_it_always_does(
    send: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    fsspec.register_implementation("cutting", Cutting, clobber=True)
    store, data = Store("cutting://store"), b"all of it"
    (tmp_path / "a").write_bytes(data)
    monkeypatch.setattr(connection, "ATTEMPTS", 3)

    def sent() -> None:
        store.write("a", data) if send == "write" else store.upload(tmp_path / "a", "a")

    monkeypatch.setattr(Cutting, "cuts", 1)
    sent()
    assert store.read("a") == data
    monkeypatch.setattr(Cutting, "cuts", 100)
    with pytest.raises(StoreError, match="cutting://store/a failed 3 times: 8 of 9 bytes arrived"):
        sent()


def test_wrong_bytes_are_no_file_at_all(any_store: str, tmp_path: Path):
    store, expected = Store(any_store), digest_of(b"as it was")
    store.write("a", b"as it is.")
    for action in (
        lambda: store.read("a", expected=expected),
        lambda: store.check("a", expected),
        lambda: store.download("a", tmp_path, "a", expected=expected),
    ):
        with pytest.raises(DamagedFileError, match="a differs: its sha256 is"):
            action()
    assert not (tmp_path / "a").exists()


def test_what_waiting_can_not_mend_is_raised_at_once():
    asked = Mock(side_effect=[TypeError("a number has no length"), OSError(errno.ENOSPC, "No space left on device")])
    with pytest.raises(TypeError):
        retried(asked, "memory://a")
    with pytest.raises(StoreError, match="make room there"):
        retried(asked, "memory://a")
    assert asked.call_count == 2


def test_verification_names_every_damaged_or_missing_file(any_store: str):
    store = Store(any_store)
    names = [f"attempt-1/{number}.bin" for number in range(6)]
    for name in names:
        store.write(name, name.encode())
    files = tuple(describe(name.encode(), name) for name in names)
    artifact = commit_artifact(store, Artifact(kind="shards", stage="images", key="k", files=files))
    seen = []
    assert verify_files(artifact.store, artifact.files, on_file=seen.append) == []
    assert len(seen) == 6
    store.write(names[1], b"short")
    store.write(names[3], names[3].upper().encode())
    store.delete(names[4])
    assert [line.split("attempt-1/")[1][:12] for line in verify_files(artifact.store, artifact.files)] == [
        "1.bin differ",
        "3.bin differ",
        "4.bin is mis",
    ]


def test_a_full_disk_is_one_clear_line_and_leaves_what_was_there(tmp_path: Path):
    """The limit on the size of a file stands for the full disk: the same call fails in the same place."""
    program = """
        import resource, sys
        from pathlib import Path
        from components.runtime.storage.store import Store, StoreError
        store = Store(sys.argv[1])
        store.write("a", b"old")
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        Path(sys.argv[1], "source").write_bytes(bytes(90_000))
        for action in (
            lambda: store.write("a", bytes(200_000)),
            lambda: store.write_once("b", bytes(200_000)),
            lambda: store.upload(Path(__file__), "c"),
        ):
            try:
                action()
            except StoreError as error:
                assert "make room there" in str(error) and "\\n" not in str(error), error
            else:
                raise AssertionError("written")
        assert store.read("a") == b"old"
    """
    script = tmp_path / "program.py"
    script.write_text(textwrap.dedent(program) + "#" * 200_000)
    done = subprocess.run([sys.executable, script, tmp_path / "store"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert sorted(path.name for path in (tmp_path / "store").iterdir()) == ["a", "source"]
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


def test_half_written_files_are_never_listed(tmp_path: Path):
    (tmp_path / "a.bin.tmp-0123abcd").write_bytes(b"half")
    (tmp_path / "a.bin").write_bytes(b"whole")
    assert [info.path for info in Store(str(tmp_path)).list()] == ["a.bin"]


@pytest.mark.parametrize("uri", ["ftp://user:hunter2@host/a", "s3://AKIA:hunter2@bucket/a"])
def test_an_address_that_holds_a_password_is_refused_without_repeating_it(uri: str):
    with pytest.raises(StoreError, match="holds credentials") as caught:
        Store(uri).check_writable()
    assert "hunter2" not in str(caught.value)


def test_a_signed_query_is_in_no_message():
    with pytest.raises(StoreError) as caught:
        retried(lambda: (_ for _ in ()).throw(PermissionError("no")), "https://host/a?X-Amz-Signature=hunter2")
    assert "https://host/a?…" in str(caught.value)
    assert "hunter2" not in str(caught.value)
