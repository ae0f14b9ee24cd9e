"""Whole-file object storage on any fsspec URL: local folders, memory and clouds by the same code.

Every write commits a whole file or nothing; `write_once` is a true write-once (the conditional put of S3, Google and
Azure, `os.link` on local disks, where fsspec's own `mode="create"` is only an exists-check and lets several racing
writers win). Sizes are checked after each transfer, sha256 where it is known; wrong bytes are fetched or sent again.
"""

import hashlib
import logging
import os
import re
import shutil
import threading
import uuid
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple, TypeVar

import fsspec
from fsspec.core import split_protocol
from fsspec.implementations.local import LocalFileSystem

from components.configuration.file_names import file_name
from components.runtime.storage import outages
from components.runtime.storage.connection import (
    FencedError,
    StoreError,
    Transfer,
    at,
    connect,
    files_below,
    reason,
    shown,
)

T = TypeVar("T")
S = TypeVar("S")
logger = logging.getLogger("cascade")

ALONE = "CASCADE_ONE_DRIVER"  # 1: its user sees to it that no two drivers are on one storage
TRANSFERS = 8  # files of one artifact in transfer at a time
SMALL_TRANSFERS = 32  # of a kilobyte each, which cost a round trip; as many as the clients' connections
BLOCK = 8 * 2**20  # bytes in memory where a file is only hashed
LOCAL = (None, "file", "local")  # protocols of this machine's disks
TEMPORARY = re.compile(r"\.tmp-[0-9a-f]{8}$")


class DamagedFileError(StoreError):
    """A file with another digest than expected, at every reading."""


class Fence(NamedTuple):
    """The token of a lease's holder: its generation, in the folder of all generations."""

    lease: str  # URI of the lease's folder
    generation: str  # name of its file there

    def check(self) -> None:
        """Raise FencedError if there is a later generation. Raises StoreError if storage can't be reached."""
        latest = max((info.path for info in list_url(self.lease) if info.path.endswith(".json")), default="")
        if latest > self.generation:
            raise FencedError(f"{shown(self.lease)}: another driver took over, for this one stood still; it gives way")


class FileInfo(NamedTuple):
    """A file in a listing."""

    path: str  # relative to the store
    bytes: int


class Digest(NamedTuple):
    """Size and sha256 of a file, expected or measured."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Store:
    """A folder of whole files at `uri`. Picklable: only the URI travels, never a connection or a secret.
    With a fence every write, deletion and listing asks first whether the lease is still its holder's, and raises
    FencedError. Methods raise StoreError for a path that is no file name, and on local disks where a link leads out."""

    uri: str
    fence: Fence | None = None

    def join(self, *parts: str) -> "Store":
        """The sub-folder `parts` as a store, behind the same fence."""
        return Store(self._url("/".join(parts)), self.fence)

    def url(self, path: str = "") -> str:
        """The absolute URL of `path`."""
        return f"{self.uri.rstrip('/')}/{path}" if path else self.uri.rstrip("/")

    def read(self, path: str, *, expected: Digest | None = None) -> bytes:
        """The bytes of a file.
        Raises FileNotFoundError, StoreError if storage can't be reached, DamagedFileError for an unexpected file."""
        return read_url(self._url(path), expected=expected)

    def check(self, path: str, expected: Digest) -> None:
        """Compare a file with the expected digest, block by block. Raises as `read`."""

        def compare(filesystem: fsspec.AbstractFileSystem, target: str) -> None:
            with filesystem.open(target, "rb", block_size=BLOCK, cache_type="readahead") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
                _compare(self.url(path), Digest(file.seek(0, os.SEEK_END), sha256), expected)

        at(self._url(path), compare)

    def write(self, path: str, data: bytes) -> None:
        """Commit a whole file, in place of an older file. Raises StoreError."""
        self._put(path, len(data), lambda file: file.write(data), lambda store, target: store.pipe_file(target, data))

    def write_once(self, path: str, data: bytes) -> bool:
        """Commit a whole file if there is none yet. Returns False if other bytes are already there.
        Of several writers a single one wins. Raises StoreError, also for a store without conditional writes, unless
        `CASCADE_ONE_DRIVER=1` says that there is a single writer: then a look goes before each write."""
        alone = os.environ.get(ALONE) == "1"
        if alone and self.exists(path):
            return self.read(path) == data
        try:
            return self._create(path, data)
        except StoreError as error:
            if not alone or not isinstance(error.__cause__, NotImplementedError):
                raise
        self.write(path, data)
        return True

    def _create(self, path: str, data: bytes) -> bool:
        """Commits a file by a conditional write. Returns False if other bytes are there."""

        def put(filesystem: fsspec.AbstractFileSystem, target: str) -> None:
            if not isinstance(filesystem, LocalFileSystem):
                filesystem.pipe_file(target, data, mode="create")
                return
            temporary = _temporary(target, lambda file: file.write(data))
            try:
                os.link(temporary, target)
            finally:
                os.unlink(temporary)

        try:
            self._change(path, put)
        except FileExistsError:
            # A retried put whose first answer was lost finds its own bytes: writers put their identity in them.
            return self.read(path) == data
        return True

    def upload(self, local: Path, path: str) -> None:
        """Commit a local file as `path`, a large file in parts where the store takes parts. Raises StoreError."""

        def copy(target: IO[bytes]) -> None:
            with open(local, "rb") as source:
                shutil.copyfileobj(source, target, BLOCK)

        size = local.stat().st_size
        self._put(path, size, copy, lambda store, target: store.put_file(str(local), target))

    def _put(self, path: str, size: int, fill: Callable[[IO[bytes]], object], send: Transfer[object]) -> None:
        """Commits a file: on local disks filled and moved into place, elsewhere sent and its size compared."""

        def put(filesystem: fsspec.AbstractFileSystem, target: str) -> None:
            if isinstance(filesystem, LocalFileSystem):
                os.replace(_temporary(target, fill), target)
                return
            send(filesystem, target)
            if (stored := filesystem.size(target)) != size:
                raise OSError(f"{stored} of {size} bytes arrived")  # to be retried

        self._change(path, put)

    def download(self, path: str, folder: Path, name: str, *, expected: Digest | None = None) -> None:
        """Copy `path` to the file `name` of a local folder; a file with another digest is not left behind.
        Raises as `read`, and StoreError for a name that leads out of the folder."""

        def get(filesystem: fsspec.AbstractFileSystem, source: str) -> None:
            filesystem.get_file(source, str(local))
            if expected is not None and (digest := digest_of(local)) != expected:
                local.unlink()
                _compare(self.url(path), digest, expected)

        local = within(folder, name)
        local.parent.mkdir(parents=True, exist_ok=True)
        at(self._url(path), get)

    def exists(self, path: str) -> bool:
        """True if there is a file or folder at `path`. Raises StoreError if storage can't be reached."""
        return at(self._url(path), lambda filesystem, target: filesystem.exists(target))

    def folders(self, prefix: str = "") -> list[str]:
        """Names of the folders directly below `prefix`, sorted."""
        try:
            entries = at(self.url(prefix), lambda filesystem, root: filesystem.ls(root, detail=True))
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(PurePosixPath(entry["name"]).name for entry in entries if entry["type"] == "directory")

    def list(self, prefix: str = "") -> list[FileInfo]:
        """All files below `prefix`, sorted by path; empty if there is no such folder."""
        if self.fence is not None:
            self.fence.check()
        folder = prefix.rstrip("/") + "/" if prefix else ""
        return [FileInfo(folder + info.path, info.bytes) for info in list_url(self.url(prefix))]

    def delete(self, path: str) -> None:
        """Delete a single file; a missing file is no error."""
        with suppress(FileNotFoundError):
            self._change(path, lambda filesystem, target: filesystem.rm_file(target))

    def delete_folder(self, prefix: str = "") -> None:
        """Delete a folder with all contents; a missing folder is no error.
        Raises StoreError for an address with a wildcard, which object stores expand to the folders of others."""
        self._check_wildcards()
        if self.exists(prefix):
            self._change(prefix, lambda filesystem, target: filesystem.rm(target, recursive=True))

    def _check_wildcards(self) -> None:
        protocol, folder = split_protocol(self.uri)
        if protocol not in LOCAL and re.search(r"[*?\[]", folder):
            raise StoreError(f"{shown(self.uri)} holds a wildcard, which deletions would expand: rename the folder")

    def _change(self, path: str, action: Transfer[object]) -> None:
        """Runs `action` behind the fence: an outage that a try waits for may be longer than the lease."""

        def fenced(filesystem: fsspec.AbstractFileSystem, target: str) -> None:
            if self.fence is not None:
                self.fence.check()
            action(filesystem, target)

        at(self._url(path), fenced)

    def _url(self, path: str) -> str:
        """Checks `path` and returns its absolute URL; of the folder itself for "". Raises StoreError."""
        protocol, folder = split_protocol(self.uri)
        try:
            if path and protocol in LOCAL:
                within(Path(folder), path)
            return self.url(path and file_name(path))
        except ValueError as error:
            raise StoreError(f"{shown(self.uri)}: {error}") from None

    def check_writable(self) -> None:
        """Write a probe file once, try to overwrite the probe, and delete the probe.
        Raises StoreError if a step fails, for an address with a wildcard, or if the store would let a second writer
        win: two drivers would harm each other there. With `CASCADE_ONE_DRIVER=1` the latter is a warning."""
        self._check_wildcards()
        probe, defect = f".probe-{uuid.uuid4().hex[:8]}", ""
        connect(self.uri)  # errors of the connection name the folder, not the probe
        try:
            if not self._create(probe, b"probe") or self._create(probe, b"another"):
                defect = "a second write took the place of the first"
            self.delete(probe)
        except (OSError, ValueError) as error:
            fault = f"storage {shown(self.uri)} can't be written: {reason(error)}"
            raise StoreError(f"{fault}; check the path, bucket and rights") from error
        except StoreError as error:
            if not isinstance(error.__cause__, NotImplementedError):
                raise
            defect = reason(error.__cause__)
        if not defect:
            return
        line = f"storage {shown(self.uri)} has no conditional writes ({defect}), which keep drivers apart"
        if os.environ.get(ALONE) != "1":
            remedy = "use another, or a newer version of it; where only one driver is ever started on it, set"
            raise StoreError(f"{line}; {remedy} {ALONE}=1")
        logger.warning("%s; %s=1: never start a second driver on it", line, ALONE)


def within(folder: Path, name: str) -> Path:
    """The path of the file `name` below a local folder.
    Raises StoreError if `name` is no file name, or if a link leads out of the folder."""
    try:
        place = folder / file_name(name)
    except ValueError as error:
        raise StoreError(f"{folder}: {error}") from None
    if not (real := place.resolve()).is_relative_to(folder.resolve()):
        raise StoreError(f"a link leads from {place} to {real}, out of {folder}; remove the link and run again")
    return place


def read_url(url: str, *, expected: Digest | None = None) -> bytes:
    """The bytes at an absolute URL. Raises as `Store.read`."""

    def get(filesystem: fsspec.AbstractFileSystem, path: str) -> bytes:
        data = filesystem.cat_file(path)
        if expected is not None:
            _compare(url, digest_of(data), expected)
        return data

    return at(url, get)


def read_range(url: str, start: int, end: int) -> bytes:
    """Bytes `start` to `end` (exclusive) at a URL, fewer from a shorter file. Raises as `Store.read`."""
    return at(url, lambda filesystem, path: filesystem.cat_file(path, start=start, end=end))


def list_url(url: str) -> list[FileInfo]:
    """Files below an absolute URL, with relative paths, sorted; empty for a missing folder."""
    root = connect(url)[1].rstrip("/")
    return sorted(
        FileInfo(name[len(root) + 1 :], int(info["size"] or 0))
        for name, info in at(url, files_below).items()
        if name != root and not TEMPORARY.search(name)
    )


def in_parallel(action: Callable[[S], T], items: Iterable[S], *, most: int = TRANSFERS) -> list[T]:
    """Runs `action` on each item, at most `most` at a time, and returns the results in order.
    Raises the first error; items not yet begun are left out, and none waits any longer for a store that is away."""
    given_up = given_up if (given_up := outages.given_up.get()).is_set() else threading.Event()
    begin = partial(outages.given_up.set, given_up)
    with ThreadPoolExecutor(most, thread_name_prefix="transfer", initializer=begin) as pool:
        try:
            waiting = [pool.submit(action, item) for item in items]
            wait(waiting, return_when=FIRST_EXCEPTION)
            for future in filter(Future.done, waiting):
                future.result()
            return [future.result() for future in waiting]
        except BaseException:
            given_up.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def digest_of(data: bytes | Path) -> Digest:
    """Size and sha256 of bytes or of a local file."""
    if isinstance(data, bytes):
        return Digest(len(data), hashlib.sha256(data).hexdigest())
    with open(data, "rb") as file:
        return Digest(os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest())


def absolute(uri: str) -> str:
    """Makes local paths in `uri` absolute, valid for a worker in another folder.
    Raises StoreError for an address that lacks a slash, a bucket or a user: it would be a local folder of that name."""
    if address := re.fullmatch(r"(file|s3a?|gcs|gs|az|abfss?|hf):(/*|/(?!/).*)", uri):
        protocol, rest = address[1], address[2].strip("/") or "PATH"
        raise StoreError(f"{uri} is no address: write {protocol}://{'/' * (protocol == 'file')}{rest}")
    try:
        return uri.rstrip("/") if "://" in uri else str(Path(uri).expanduser().resolve())
    except RuntimeError as error:
        raise StoreError(f"{uri} can't be found: {error}; write the whole path") from error


def _compare(url: str, digest: Digest, expected: Digest) -> None:
    """Raises DamagedFileError for another digest than expected."""
    if digest.bytes != expected.bytes:
        raise DamagedFileError(f"{shown(url)} differs: it has {digest.bytes} bytes, not {expected.bytes}")
    if digest != expected:
        here, there = f"{digest.sha256[:12]}…", f"{expected.sha256[:12]}…"
        raise DamagedFileError(f"{shown(url)} differs: its sha256 is {here}, not {there}")


def _temporary(target: str, fill: Callable[[IO[bytes]], object]) -> str:
    """Writes a temporary file next to `target`, flushed to the disk. Leaves no file on failure."""
    os.makedirs(os.path.dirname(target), exist_ok=True)
    temporary = f"{target}.tmp-{uuid.uuid4().hex[:8]}"
    try:
        with open(temporary, "wb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return temporary
