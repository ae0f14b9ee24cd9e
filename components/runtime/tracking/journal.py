"""A local file of events on the way to MLflow: each is on disk before being sent.

{spool}/{time}-{id}/journal.json    where it is to be sent
                    events.jsonl    one record a line, appended
                    shipped         how many bytes of it have been sent
                    rejected.jsonl  records that MLflow refused for good
                    lock            held by the process that writes or sends it
"""

import json
import logging
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from components.runtime.events import LogEntry

logger = logging.getLogger(__name__)
HEADER, LOCK = "journal.json", "lock"
BYTES_AT_ONCE = 2**24


class Journal:
    """A journal of a single process; any thread may append, one thread sends."""

    def __init__(self, folder: Path, *, destination: dict[str, str], lock: FileLock) -> None:
        self.folder = folder
        self.destination = destination
        self._lock = lock
        self._events = open(folder / "events.jsonl", "ab")  # noqa: SIM115 - open as long as the journal

    def append(self, line: bytes) -> None:
        """Write a line. After the call the line outlives the process."""
        # A killed process leaves at most its last line unfinished.
        self._events.write(line)
        self._events.flush()

    def records(self) -> list[LogEntry]:
        """All records, sent or not."""
        return [record for record, _ in self._read(0)]

    def unshipped(self, *, limit: int) -> tuple[list[LogEntry], int]:
        """The next records to send, at most `limit` and about 16 MB, and the position to `mark` afterwards."""
        records, start = [], self._shipped()
        position = start
        for record, position in self._read(start):
            records.append(record)
            if len(records) == limit or position - start > BYTES_AT_ONCE:
                break
        return records, position

    def mark(self, position: int) -> None:
        """Remember that every record before `position` has arrived."""
        temporary = self.folder / "shipped.tmp"
        temporary.write_text(str(position))
        os.replace(temporary, self.folder / "shipped")

    def set_aside(self, line: bytes, reason: str) -> None:
        """Keep a record that MLflow refused for good, with the reason, and go on."""
        with open(self.folder / "rejected.jsonl", "ab") as file:
            file.write(b'{"reason": %s, "record": %s}\n' % (json.dumps(reason).encode(), line.strip()))

    def close(self) -> None:
        """Let go of the journal; remove a completely delivered journal from disk."""
        self._events.close()
        arrived = self._shipped() >= (self.folder / "events.jsonl").stat().st_size
        emptied = arrived and not (self.folder / "rejected.jsonl").exists()
        if emptied:
            for path in sorted(self.folder.iterdir(), reverse=True):
                if path.name not in (HEADER, LOCK):
                    path.unlink()
            (self.folder / HEADER).unlink()  # last: a process that is killed here leaves a journal for the next one
        self._lock.release()
        if emptied:
            _remove(self.folder)

    def _shipped(self) -> int:
        path = self.folder / "shipped"
        return int(path.read_text()) if path.exists() else 0

    def _read(self, position: int) -> Iterator[tuple[LogEntry, int]]:
        with open(self.folder / "events.jsonl", "rb") as file:
            file.seek(position)
            for line in file:
                if not line.endswith(b"\n"):  # being written just now, or by a process that was killed meanwhile
                    return
                position += len(line)
                try:
                    yield LogEntry.read(line), position
                except json.JSONDecodeError:  # the unfinished line of a killed process, ended by its successor
                    continue
                except (LookupError, TypeError, ValueError):
                    logger.warning("%s: a record of another version is left out", self.folder, exc_info=True)


def new_journal(spool: Path, *, destination: dict[str, str]) -> Journal:
    """Begin a journal in `spool`."""
    folder = spool / f"{time.time_ns():020d}-{uuid.uuid4().hex[:8]}"
    folder.mkdir(parents=True, mode=0o700)  # an address may carry a password
    lock = _locked(folder)
    assert lock is not None
    (folder / HEADER).write_text(json.dumps(destination))
    return Journal(folder, destination=destination, lock=lock)


def left_journals(spool: Path, *, destination: dict[str, str]) -> list[Journal]:
    """Journals for `destination` of other processes, oldest first; skips journals in use."""
    journals = []
    for folder in sorted(spool.glob("*/")):
        header = folder / HEADER
        if _destination(header) != destination:
            continue
        lock = _locked(folder)
        if lock is None:
            continue
        if not header.is_file():  # whoever held it has just removed it, and to lock it made its folder again
            lock.release()
            _remove(folder)
            continue
        path = folder / "events.jsonl"
        if path.exists() and (data := path.read_bytes()) and not data.endswith(b"\n"):
            with open(path, "ab") as file:
                file.write(b"\n")
        journals.append(Journal(folder, destination=destination, lock=lock))
    return journals


def _destination(header: Path) -> dict[str, str] | None:
    try:
        return json.loads(header.read_text())
    except (FileNotFoundError, json.JSONDecodeError):  # removed, or being written, just now
        return None


def _locked(folder: Path) -> FileLock | None:
    """The journal's lock, held; None if another process holds the lock.

    A killed process lets go of its lock.
    """
    lock = FileLock(folder / LOCK, thread_local=False)  # the thread that sends is not the one that began
    try:
        lock.acquire(blocking=False)
    except (Timeout, FileNotFoundError):  # held, or its folder was removed just now
        return None
    return lock


def _remove(folder: Path) -> None:
    """Remove the folder of an empty journal; the lock is free, because Windows keeps open files."""
    with suppress(OSError):  # another process looks at it just now, and removes it then
        (folder / LOCK).unlink(missing_ok=True)
        folder.rmdir()
