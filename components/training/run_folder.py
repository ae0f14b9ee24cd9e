"""Ray Train's run folder in object storage: whole-file writes, listed checkpoints, fetches by node."""

import io
import json
import re
import secrets
import tempfile
from functools import partial
from pathlib import Path
from typing import NamedTuple

import fsspec
import pyarrow.fs
from filelock import FileLock
from pydantic import TypeAdapter, ValidationError

from components.configuration.config import first_fault
from components.configuration.file_names import FileName
from components.runtime.storage.connection import connect, retried
from components.runtime.storage.scratch import SCRATCH, held_folder
from components.runtime.storage.store import (
    DamagedFileError,
    Digest,
    Fence,
    Store,
    StoreError,
    in_parallel,
    read_url,
)
from components.training.checkpoint import digests_file, read_checkpoint
from components.training.loop import Task
from components.training.parallel import Worker, any_rank, lowest
from components.training.reporting import NOTHING, Elapsed

SNAPSHOT = "checkpoint_manager_snapshot.json"  # Ray Train's list of finished checkpoints
NAME = re.compile(r"step-([0-9]{9,})(\.[0-9]+)?")  # of a checkpoint; then the lease's generation
TOKEN_BITS = 62
REFUSED = "refused.txt"  # the damage that the fetching rank found


class Checkpointed(NamedTuple):
    """A checkpoint in Ray Train's list."""

    name: str  # folder below the run folder
    step: int  # steps taken


def checkpoint_name(step: int, run: Store | None = None) -> str:
    """Name of the checkpoint after `step` steps; a resumed run replaces its remains.
    Behind the fence of `run` it ends with the lease's generation: no two holders write files of one name."""
    fence = None if run is None else run.fence
    return f"step-{step:09d}" + ("" if fence is None else f".{fence.generation.removesuffix('.json')}")


def last_checkpoint(run: Store) -> Checkpointed | None:
    """The last checkpoint in Ray Train's list; None for an empty one. Raises StoreError for other names.
    Folders outside of the list are remains of killed uploads."""
    try:
        snapshot = json.loads(run.read(SNAPSHOT))
    except FileNotFoundError:
        return None
    latest = snapshot["latest_checkpoint_result"]
    if latest is None:
        return None
    name = str(latest["checkpoint_dir_name"])
    if (named := NAME.fullmatch(name)) is None:
        raise StoreError(f"{run.url(SNAPSHOT)} lists {name!r}, no checkpoint; delete {run.url()} and run again")
    return Checkpointed(name, int(named[1]))


def forget_checkpoint(run: Store, name: str) -> Checkpointed | None:
    """Strike a checkpoint off Ray Train's list. Returns the last one then, None if there is none."""
    snapshot = json.loads(run.read(SNAPSHOT))
    rest = [
        (result, index)
        for result, index in zip(snapshot["checkpoint_results"], snapshot["checkpoint_report_indices"], strict=True)
        if result["checkpoint_dir_name"] != name
    ]
    snapshot["checkpoint_results"] = [result for result, _ in rest]
    snapshot["checkpoint_report_indices"] = [index for _, index in rest]
    snapshot["latest_checkpoint_result"] = rest[-1][0] if rest else None
    run.write(SNAPSHOT, json.dumps(snapshot).encode())
    return last_checkpoint(run)


def restore_on_node(run: Store, name: str, task: Task, worker: Worker) -> tuple[int, Elapsed]:
    """Restores a task's state from a checkpoint, called by every rank; no copy stays on the node.
    Returns steps and seconds taken. Raises DamagedFileError on all ranks where any rank finds damage."""
    step, elapsed, why = 0, NOTHING, ""
    with held_folder(place_on_node(worker)) as place:
        try:
            step, state = read_checkpoint(partial(fetch_once, run, name, place=place))
            elapsed = Elapsed(*state.pop("elapsed", NOTHING))
            task.load_state_dict(state)
        except DamagedFileError as error:
            why = str(error) or "it is damaged"
        damaged = any_rank(bool(why), worker)  # all ranks have read what they need now
    if damaged:
        raise DamagedFileError(why or "another worker can't read it")
    return step, elapsed


def place_on_node(worker: Worker) -> Path:
    """A folder with a new name at each start, the same on all ranks: no old file can be there."""
    token = lowest(secrets.randbits(TOKEN_BITS) if worker.rank == 0 else 2**TOKEN_BITS, worker)
    return Path(tempfile.gettempdir()) / f"{SCRATCH}restore-{token:016x}"


def fetch_once(run: Store, name: str, file: str, *, place: Path) -> Path:
    """A file of a checkpoint, verified, in `place`; the node's first rank fetches it, others wait.
    Raises DamagedFileError, also in ranks that only waited, for a missing file or digest, or one that differs."""
    place.mkdir(mode=0o700, exist_ok=True)
    local, refused = place / file, place / REFUSED
    with FileLock(place / f"{file}.lock"):
        if refused.exists():
            raise DamagedFileError(refused.read_text())
        if local.exists():
            return local
        try:
            run.download(f"{name}/{file}", place, f"{file}.part", expected=digest_of_file(run, name, file))
        except (FileNotFoundError, DamagedFileError) as error:
            refused.write_text(why := f"{run.url(name)} is not whole: {error}")
            raise DamagedFileError(why) from error
        return (place / f"{file}.part").rename(local)


def digest_of_file(run: Store, name: str, file: str) -> Digest:
    """The digest of a file, by its part's list. Raises FileNotFoundError, or DamagedFileError."""
    listed = digests_file(file)
    try:
        return TypeAdapter(dict[FileName, Digest]).validate_json(run.read(f"{name}/{listed}"))[file]
    except (ValidationError, KeyError) as error:
        fault = first_fault(error) if isinstance(error, ValidationError) else f"it lacks {file}"
        raise DamagedFileError(f"{listed} is no list of digests: {fault}") from error


def upload_folder(local: Path, run: Store, name: str) -> None:
    """Copy the files of `local` to the run's folder `name`, whole, retried, several at a time."""
    files = sorted(path for path in local.rglob("*") if path.is_file())
    in_parallel(lambda file: run.upload(file, f"{name}/{file.relative_to(local).as_posix()}"), files)


def storage_of(folder: Store) -> tuple[str, pyarrow.fs.FileSystem]:
    """(path without protocol, filesystem) in Ray Train's form, for any fsspec URL."""
    filesystem, path = connect(folder.uri)
    return path, pyarrow.fs.PyFileSystem(WholeFiles(filesystem, folder.fence))


class WholeFiles(pyarrow.fs.FSSpecHandler):
    """A filesystem whose files appear whole or not at all, for Ray Train's own small files.
    A driver killed while it writes its snapshot must not lose the run. A call that fails is retried; what writes,
    deletes or lists stops at the fence."""

    def __init__(self, filesystem: fsspec.AbstractFileSystem, fence: Fence | None) -> None:
        super().__init__(filesystem)
        self.fence = fence

    def store(self, path: str) -> Store:
        """The folder `path` as a store behind the fence."""
        return Store(self.fs.unstrip_protocol(path), self.fence)

    def get_file_info(self, paths: list[str]) -> list[pyarrow.fs.FileInfo]:
        return retried(lambda: super(WholeFiles, self).get_file_info(paths), self.fs.unstrip_protocol(paths[0]))

    def get_file_info_selector(self, selector: pyarrow.fs.FileSelector) -> list[pyarrow.fs.FileInfo]:
        url = self.fs.unstrip_protocol(selector.base_dir)
        if self.fence is not None:
            self.fence.check()
        return retried(lambda: super(WholeFiles, self).get_file_info_selector(selector), url)

    def create_dir(self, path: str, recursive: bool) -> None:
        retried(lambda: super(WholeFiles, self).create_dir(path, recursive), self.fs.unstrip_protocol(path))

    def delete_dir(self, path: str) -> None:
        self.store(path).delete_folder()

    def open_input_stream(self, path: str) -> pyarrow.NativeFile:
        return self.open_input_file(path)

    def open_input_file(self, path: str) -> pyarrow.NativeFile:
        return pyarrow.BufferReader(read_url(self.fs.unstrip_protocol(path)))

    def open_output_stream(self, path: str, metadata: dict[str, str] | None) -> pyarrow.PythonFile:
        folder, _, name = path.rpartition("/")
        return pyarrow.PythonFile(_PendingFile(self.store(folder), name), mode="w")


class _PendingFile(io.BytesIO):
    def __init__(self, folder: Store, name: str) -> None:
        super().__init__()
        self.folder, self.name = folder, name

    def close(self) -> None:
        if not self.closed:
            self.folder.write(self.name, self.getvalue())
        super().close()
