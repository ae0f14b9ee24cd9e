"""Ray Train's run folder in object storage: whole-file writes into it, and the last checkpoint that it lists."""

import io
import json
from pathlib import Path
from typing import NamedTuple

import fsspec
import pyarrow.fs

from components.storage.store import Store

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
    name = latest["checkpoint_dir_name"]
    return Checkpointed(name, int(name.removeprefix(PREFIX)))


def upload_folder(local: Path, run: Store, name: str) -> None:
    """Copy the files of `local` to the run's folder `name`, each whole and retried."""
    for file in sorted(path for path in local.rglob("*") if path.is_file()):
        run.upload(file, f"{name}/{file.relative_to(local).as_posix()}")


def download_folder(run: Store, name: str, local: Path) -> Path:
    """Copy the run's folder `name` to `local`. Returns `local`."""
    for file in run.list(name):
        run.download(file.path, local / Path(file.path).relative_to(name))
    return local


def storage_of(folder: Store) -> tuple[str, pyarrow.fs.FileSystem]:
    """(path without protocol, filesystem) as Ray Train wants them, for any fsspec URL."""
    filesystem, path = fsspec.core.url_to_fs(folder.uri, use_listings_cache=False)
    return path, pyarrow.fs.PyFileSystem(WholeFiles(filesystem))


class WholeFiles(pyarrow.fs.FSSpecHandler):
    """Files that appear whole or not at all: a driver killed while it writes its snapshot must not lose the run.

    For the small files that Ray Train writes itself; checkpoints are uploaded by `upload_folder`.
    """

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
