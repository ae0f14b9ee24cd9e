"""Whole-file object storage on any fsspec URL: local folders, memory and S3 through one code path.

Every write commits a whole file or nothing; `write_once` is a true write-once (conditional put on S3, `os.link` on
local disks, where fsspec's own `mode="create"` is only an exists-check and lets several racing writers win).
"""

import os
import shutil
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple, TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem
from tenacity import RetryError, Retrying, retry_if_exception, stop_after_attempt, wait_random_exponential

T = TypeVar("T")

ATTEMPTS = 6
FINAL_ERRORS = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError, ValueError)


class StoreError(Exception):
    """Storage can't do what was asked; the message names the URL and the remedy in one line."""


class FileInfo(NamedTuple):
    path: str  # relative to the store
    bytes: int


@dataclass(frozen=True)
class Store:
    """A folder of whole files at `uri`. Picklable: only the URI travels, never a connection or a secret."""

    uri: str

    def join(self, *parts: str) -> "Store":
        """The sub-folder `parts` as a store of its own."""
        return Store("/".join([self.uri.rstrip("/"), *(part.strip("/") for part in parts)]))

    def url(self, path: str = "") -> str:
        """The absolute URL of `path` in this store."""
        return f"{self.uri.rstrip('/')}/{path}" if path else self.uri.rstrip("/")

    def read(self, path: str) -> bytes:
        """The bytes of a file. Raises FileNotFoundError if it is missing, StoreError if storage can't be reached."""
        return read_url(self.url(path))

    def write(self, path: str, data: bytes) -> None:
        """Commit a whole file, replacing what was there."""
        filesystem, target = _locate(self.url(path))
        if isinstance(filesystem, LocalFileSystem):
            _retried(lambda: os.replace(_local_temporary(target, data), target), self.url(path))
        else:
            _retried(lambda: filesystem.pipe_file(target, data), self.url(path))

    def write_once(self, path: str, data: bytes) -> bool:
        """Commit a whole file if there is none yet. Returns False if other bytes are already there."""
        filesystem, target = _locate(self.url(path))
        try:
            if isinstance(filesystem, LocalFileSystem):
                _link_once(target, data)
            else:
                _retried(lambda: filesystem.pipe_file(target, data, mode="create"), self.url(path))
        except FileExistsError:
            # A retried put whose first answer was lost finds its own bytes: writers put their identity in them.
            return self.read(path) == data
        return True

    def upload(self, local: Path, path: str) -> None:
        """Commit a local file as `path` (multipart where the store has it)."""
        filesystem, target = _locate(self.url(path))
        if isinstance(filesystem, LocalFileSystem):
            temporary = _temporary_name(target)
            shutil.copyfile(local, temporary)
            os.replace(temporary, target)
        else:
            _retried(lambda: filesystem.put_file(str(local), target), self.url(path))

    def download(self, path: str, local: Path) -> None:
        """Copy `path` to a local file."""
        filesystem, source = _locate(self.url(path))
        local.parent.mkdir(parents=True, exist_ok=True)
        _retried(lambda: filesystem.get_file(source, str(local)), self.url(path))

    def exists(self, path: str) -> bool:
        filesystem, target = _locate(self.url(path))
        return _retried(lambda: filesystem.exists(target), self.url(path))

    def folders(self, prefix: str = "") -> list[str]:
        """Names of the folders directly below `prefix`, sorted."""
        filesystem, root = _locate(self.url(prefix))
        try:
            entries = _retried(lambda: filesystem.ls(root, detail=True), self.url(prefix))
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(PurePosixPath(entry["name"]).name for entry in entries if entry["type"] == "directory")

    def list(self, prefix: str = "") -> list[FileInfo]:
        """All files below `prefix`, sorted by path; empty if there is no such folder."""
        base = self.url(prefix)
        skip = len(prefix.rstrip("/")) + 1 if prefix else 0
        found = list_url(base)
        return [FileInfo(f"{prefix.rstrip('/')}/{info.path}" if skip else info.path, info.bytes) for info in found]

    def delete(self, path: str) -> None:
        """Delete one file; deleting what is not there is no error."""
        filesystem, target = _locate(self.url(path))
        try:
            _retried(lambda: filesystem.rm_file(target), self.url(path))
        except FileNotFoundError:
            return

    def delete_folder(self, prefix: str = "") -> None:
        """Delete a folder and all below it."""
        filesystem, target = _locate(self.url(prefix))
        if filesystem.exists(target):
            _retried(lambda: filesystem.rm(target, recursive=True), self.url(prefix))

    def check_writable(self) -> None:
        """Write and delete a probe file. Raises StoreError with the remedy if that fails."""
        probe = f".probe-{uuid.uuid4().hex[:8]}"
        try:
            self.write(probe, b"probe")
            self.delete(probe)
        except (OSError, ValueError) as error:
            raise StoreError(
                f"storage {self.uri} can't be written: {_reason(error)}; check the path, bucket and rights"
            ) from error


def read_url(url: str) -> bytes:
    """The bytes at one absolute URL. Raises FileNotFoundError or StoreError."""
    filesystem, path = _locate(url)
    return _retried(lambda: filesystem.cat_file(path), url)


def list_url(url: str) -> list[FileInfo]:
    """Files below one absolute URL, paths relative to it, sorted; empty if there is nothing."""
    filesystem, root = _locate(url)
    found = _retried(lambda: filesystem.find(root, detail=True), url)
    root = root.rstrip("/")
    return sorted(
        FileInfo(name[len(root) + 1 :], int(info["size"] or 0)) for name, info in found.items() if name != root
    )


def absolute(uri: str) -> str:
    """`uri` with local paths made absolute, so that a worker in another folder means the same place."""
    if "://" in uri:
        return uri.rstrip("/")
    return str(Path(uri).expanduser().resolve())


def _locate(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    try:
        return fsspec.core.url_to_fs(url, use_listings_cache=False)
    except (ValueError, ImportError) as error:
        raise StoreError(f"{url}: {error}; use a local path, s3://bucket/path or another fsspec URL") from error


def _retried(action: Callable[[], T], url: str) -> T:
    """Run `action` with retries and jitter; what can't get better by waiting is raised at once."""
    retrying = Retrying(
        stop=stop_after_attempt(ATTEMPTS),
        wait=wait_random_exponential(multiplier=0.2, max=10),
        retry=retry_if_exception(lambda error: isinstance(error, OSError) and not isinstance(error, FINAL_ERRORS)),
    )
    try:
        return retrying(action)
    except RetryError as error:
        cause = error.last_attempt.exception()
        raise StoreError(
            f"{url} failed {ATTEMPTS} times: {_reason(cause)}; check the network and the endpoint"
        ) from cause
    except PermissionError as error:
        raise StoreError(
            f"{url}: access denied ({_reason(error)}); check the credentials and the bucket's policy"
        ) from error
    except Exception as error:
        if "credential" in type(error).__name__.lower():
            raise StoreError(f"{url}: no credentials found; set AWS_ACCESS_KEY_ID or give the pod a role") from error
        raise


def _reason(error: BaseException | None) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]


def _temporary_name(target: str) -> str:
    os.makedirs(os.path.dirname(target), exist_ok=True)
    return f"{target}.tmp-{uuid.uuid4().hex[:8]}"


def _local_temporary(target: str, data: bytes) -> str:
    temporary = _temporary_name(target)
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return temporary


def _link_once(target: str, data: bytes) -> None:
    temporary = _local_temporary(target, data)
    try:
        os.link(temporary, target)
    finally:
        os.unlink(temporary)
