"""Ray Train's run folder in object storage: whole-file writes into it, and the checkpoints that it lists."""

import io
import json
import re
from pathlib import Path
from typing import NamedTuple

import pyarrow.fs

from components.runtime.storage.connection import connect, retried
from components.runtime.storage.store import DamagedFileError, Store, StoreError, in_parallel, read_url
from components.training.checkpoint import DIGESTS, read_digests

SNAPSHOT = "checkpoint_manager_snapshot.json"  # Ray Train's list of finished checkpoints
PREFIX = "step-"


class Checkpointed(NamedTuple):
    name: str  # folder below the run folder
    step: int  # steps taken


def checkpoint_name(step: int) -> str:
    """Name of the checkpoint after `step` steps; a resumed run that gets there again replaces what was left of it."""
    return f"{PREFIX}{step:09d}"


def last_checkpoint(run: Store) -> Checkpointed | None:
    """The last checkpoint that Ray Train has registered, which is the one it hands to restarted workers.

    Folders that the snapshot does not list are left over from killed uploads.
    """
    try:
        snapshot = json.loads(run.read(SNAPSHOT))
    except FileNotFoundError:
        return None
    latest = snapshot["latest_checkpoint_result"]
    if latest is None:
        return None
    name = str(latest["checkpoint_dir_name"])
    if not re.fullmatch(PREFIX + "[0-9]{9,}", name):
        raise StoreError(f"{run.url(SNAPSHOT)} lists {name!r}, no checkpoint; delete {run.url()} and run again")
    return Checkpointed(name, int(name.removeprefix(PREFIX)))


def forget_checkpoint(run: Store, name: str) -> Checkpointed | None:
    """Strike a checkpoint off Ray Train's list, so that the one before is the last. Returns that one, None if none."""
    snapshot = json.loads(run.read(SNAPSHOT))
    kept = [
        (result, index)
        for result, index in zip(snapshot["checkpoint_results"], snapshot["checkpoint_report_indices"], strict=True)
        if result["checkpoint_dir_name"] != name
    ]
    snapshot["checkpoint_results"] = [result for result, _ in kept]
    snapshot["checkpoint_report_indices"] = [index for _, index in kept]
    snapshot["latest_checkpoint_result"] = kept[-1][0] if kept else None
    run.write(SNAPSHOT, json.dumps(snapshot).encode())
    return last_checkpoint(run)


def fetch_checkpoint(run: Store, name: str, local: Path) -> Path:
    """Copy a checkpoint to `local` and compare it with the digests that were written with it. Returns `local`.

    Raises DamagedFileError for a file that is missing, the list of digests too, or differs however often it is read.
    """
    try:
        expected = read_digests(run.read(f"{name}/{DIGESTS}"))
        in_parallel(lambda file: run.download(f"{name}/{file}", local, file, expected=expected[file]), expected)
    except (FileNotFoundError, ValueError) as error:
        raise DamagedFileError(f"{run.url(name)} is not whole: {error}") from error
    return local


def upload_folder(local: Path, run: Store, name: str) -> None:
    """Copy the files of `local` to the run's folder `name`, each whole, retried, and several at a time."""

    def send(file: Path) -> None:
        run.upload(file, f"{name}/{file.relative_to(local).as_posix()}")

    in_parallel(send, sorted(path for path in local.rglob("*") if path.is_file()))


def storage_of(folder: Store) -> tuple[str, pyarrow.fs.FileSystem]:
    """(path without protocol, filesystem) as Ray Train wants them, for any fsspec URL."""
    filesystem, path = connect(folder.uri)
    return path, pyarrow.fs.PyFileSystem(WholeFiles(filesystem))


class WholeFiles(pyarrow.fs.FSSpecHandler):
    """Files that appear whole or not at all: a driver killed while it writes its snapshot must not lose the run.

    For the small files that Ray Train keeps itself; checkpoints go by `upload_folder` and `fetch_checkpoint`. A call
    that fails is retried.
    """

    def get_file_info(self, paths: list[str]) -> list[pyarrow.fs.FileInfo]:
        return retried(lambda: super(WholeFiles, self).get_file_info(paths), self.fs.unstrip_protocol(paths[0]))

    def get_file_info_selector(self, selector: pyarrow.fs.FileSelector) -> list[pyarrow.fs.FileInfo]:
        url = self.fs.unstrip_protocol(selector.base_dir)
        return retried(lambda: super(WholeFiles, self).get_file_info_selector(selector), url)

    def create_dir(self, path: str, recursive: bool) -> None:
        retried(lambda: super(WholeFiles, self).create_dir(path, recursive), self.fs.unstrip_protocol(path))

    def delete_dir(self, path: str) -> None:
        Store(self.fs.unstrip_protocol(path)).delete_folder()

    def open_input_stream(self, path: str) -> pyarrow.NativeFile:
        return self.open_input_file(path)

    def open_input_file(self, path: str) -> pyarrow.NativeFile:
        return pyarrow.BufferReader(read_url(self.fs.unstrip_protocol(path)))

    def open_output_stream(self, path: str, metadata: dict[str, str] | None) -> pyarrow.PythonFile:
        return pyarrow.PythonFile(_PendingFile(self.fs.unstrip_protocol(path)), mode="w")


class _PendingFile(io.BytesIO):
    def __init__(self, url: str) -> None:
        super().__init__()
        self.url = url

    def close(self) -> None:
        if not self.closed:
            folder, _, name = self.url.rpartition("/")
            Store(folder).write(name, self.getvalue())
        super().close()
