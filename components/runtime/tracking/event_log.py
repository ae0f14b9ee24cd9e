"""The ordered log of a run's events, and the journal in which they wait for MLflow.

{root}/stages/{stage}/{key}/log/{time}-{id}-{number}.jsonl    one writer's points and warnings of a stage, in segments
{spool}/{time}-{id}/journal.json    where its journal, which holds all events until MLflow has them, is to be sent
                    events.jsonl    one record a line, appended: each is on disk before being sent
                    shipped         how many bytes of it have been sent
                    rejected.jsonl  records that MLflow refused for good
                    lock            held by the process that writes or sends it
{root}/runs/{run}/undelivered/{time}-{id}/{position}.jsonl    lines of a journal that MLflow did not take, from there on

Object storage can't append, so a segment is written whole until it is full, and then the next one begins. Segments
leave out what only MLflow shows: the machine's load, images and texts.
"""

import errno
import json
import logging
import os
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from filelock import FileLock, Timeout

from components.runtime import events
from components.runtime.events import LogEntry
from components.runtime.storage.artifact import LOG
from components.runtime.storage.store import Store, StoreError, in_parallel
from components.runtime.tracking.names import SYSTEM

logger = logging.getLogger(__name__)
HEADER, LOCK, REJECTED, KEPT = "journal.json", "lock", "rejected.jsonl", "kept"
UNDELIVERED = "undelivered"  # folder of a run
BYTES_AT_ONCE = 2**24
SEGMENT_BYTES = 2**20  # about the most that is written again when a line is added


class Journal:
    """A journal of a single process; any thread may append, one thread sends."""

    def __init__(self, folder: Path, *, destination: dict[str, str], lock: FileLock) -> None:
        self.folder, self.destination = folder, destination
        self.place: Store | None = None  # of a copy that outlives this machine; None until a run has begun
        self._lock = lock
        self._kept = 0  # position up to which this process has copied it
        shipped = folder / "shipped"
        self._shipped = int(shipped.read_text() or 0) if shipped.exists() else 0
        self._events = open(folder / "events.jsonl", "ab+", buffering=0)  # noqa: SIM115 - open as long as the journal
        if end := self._events.tell():
            self._events.seek(end - 1)
            if self._events.read(1) != b"\n":  # of a killed process
                self._events.write(b"\n")

    def append(self, line: bytes) -> None:
        """Write a line that outlives the process; a killed process leaves at most its last line unfinished.
        Raises OSError where the disk has no room, and leaves no part of the line."""
        before = self._events.seek(0, os.SEEK_END)
        try:
            if self._events.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            self._events.truncate(before)
            raise

    def records(self) -> list[LogEntry]:
        """All records, sent or not."""
        return [record for record, _ in self._read(0)]

    def unshipped(self, *, limit: int) -> tuple[list[LogEntry], int]:
        """The next records to send, at most `limit` and about 16 MB, and the position to `mark` afterwards."""
        records, start = [], self._shipped
        position = start
        for record, position in self._read(start):
            records.append(record)
            if len(records) == limit or position - start > BYTES_AT_ONCE:
                break
        return records, position

    def mark(self, position: int) -> None:
        """Remember that every record before `position` has arrived."""
        self._shipped, temporary = position, self.folder / "shipped.tmp"
        with suppress(OSError):  # no room: the next process sends again what this one has sent
            temporary.write_text(str(position))
            os.replace(temporary, self.folder / "shipped")

    def set_aside(self, line: bytes, reason: str) -> None:
        """Keep a record that MLflow refused for good, with the reason, and go on."""
        with suppress(OSError), open(self.folder / REJECTED, "ab") as file:
            file.write(b'{"reason": %s, "record": %s}\n' % (json.dumps(reason).encode(), line.strip()))

    def refused(self) -> list[tuple[str, LogEntry]]:
        """Records that MLflow refused for good, each after the reason."""
        path = self.folder / REJECTED
        lines = map(json.loads, path.read_bytes().splitlines()) if path.exists() else ()
        return [(line["reason"], LogEntry.read(json.dumps(line["record"]).encode())) for line in lines]

    def left(self) -> list[LogEntry]:
        """Records that MLflow has not taken, or refused."""
        if not (self.folder / HEADER).exists():
            return []
        return [*(record for _, record in self.refused()), *(record for record, _ in self._read(self._shipped))]

    def keep(self) -> None:
        """Copy what MLflow has not taken to the run's folder, all of it where MLflow refused a record.
        Raises StoreError, or OSError."""
        if self.place is None:
            return
        start = 0 if (self.folder / REJECTED).exists() else max(self._shipped, self._kept)
        with open(self.folder / "events.jsonl", "rb") as file:
            file.seek(start)
            data = file.read()
        if end := data.rfind(b"\n") + 1:
            (self.folder / KEPT).touch()
            self.place.write(f"{start:015d}.jsonl", data[:end])
            self._kept = start + end

    def discard(self) -> None:
        """Let go of the journal and remove it; nothing of it is to be sent."""
        self.mark((self.folder / "events.jsonl").stat().st_size)
        self.close()

    def close(self) -> None:
        """Let go of the journal; remove a completely delivered journal from disk."""
        self._events.close()
        arrived = self._shipped >= (self.folder / "events.jsonl").stat().st_size
        emptied = arrived and not (self.folder / REJECTED).exists()
        if emptied:
            if (self.folder / KEPT).exists() and self.place is not None:
                with suppress(StoreError):
                    self.place.delete_folder()
            for path in sorted(self.folder.iterdir(), reverse=True):
                if path.name not in (HEADER, LOCK):
                    path.unlink()
            (self.folder / HEADER).unlink()  # last: a process that is killed here leaves a journal for the next one
        self._lock.release()
        if emptied:
            _remove(self.folder)

    def _read(self, position: int) -> Iterator[tuple[LogEntry, int]]:
        with open(self.folder / "events.jsonl", "rb") as file:
            file.seek(position)
            for line in file:
                if not line.endswith(b"\n"):  # being written, or by a killed process
                    return
                position += len(line)
                try:
                    yield LogEntry.read(line), position
                except json.JSONDecodeError:  # the unfinished line of a killed process, ended by its successor
                    continue
                except (LookupError, TypeError, ValueError):
                    logger.warning("%s: a record of another version is left out", self.folder, exc_info=True)


def journal_name() -> str:
    """A new name for a journal, by time."""
    return f"{time.time_ns():020d}-{uuid.uuid4().hex[:8]}"


def open_journal(spool: Path, *, destination: dict[str, str], name: str = "") -> Journal:
    """Begin a journal in `spool`, or go on with the journal `name` of a process that died.
    Raises OSError where the disk has no room."""
    folder = spool / (name or journal_name())
    folder.mkdir(parents=True, mode=0o700, exist_ok=True)  # an address may carry a password
    if (lock := _locked(folder)) is None:  # another driver found it in the meantime, and sends it
        return open_journal(spool, destination=destination)
    (folder / HEADER).write_text(json.dumps(destination))
    return Journal(folder, destination=destination, lock=lock)


def restored_journal(copy: Store, spool: Path, *, destination: dict[str, str]) -> Journal:
    """Begin a journal in `spool` with what another kept in `copy`. Raises StoreError."""
    lines = b"".join(copy.read(info.path) for info in copy.list())
    (spool / (name := copy.uri.rpartition("/")[2])).mkdir(parents=True)
    (spool / name / "events.jsonl").write_bytes(lines)
    (spool / name / KEPT).touch()
    return open_journal(spool, destination=destination, name=name)


def left_journals(spool: Path, *, destination: dict[str, str]) -> list[Journal]:
    """Journals for `destination` of other processes, oldest first; skips journals in use."""
    journals = []
    for folder in sorted(spool.glob("*/")):
        header = folder / HEADER
        try:
            is_ours = json.loads(header.read_text()) == destination
        except (FileNotFoundError, PermissionError, json.JSONDecodeError):  # removed, half written, or not ours
            continue
        if not is_ours or (lock := _locked(folder)) is None:
            continue
        if not header.is_file():  # its holder has just removed it, the lock made its folder again
            lock.release()
            _remove(folder)
            continue
        journals.append(Journal(folder, destination=destination, lock=lock))
    return journals


def _locked(folder: Path) -> FileLock | None:
    """The journal's lock, held; None if another process holds it. A killed process lets go of its lock."""
    lock = FileLock(folder / LOCK, thread_local=False)  # the thread that sends is not the one that began
    try:
        lock.acquire(blocking=False)
    except (Timeout, FileNotFoundError, PermissionError):  # held, or its folder was removed, or is another user's
        return None
    return lock


def _remove(folder: Path) -> None:
    """Remove the folder of an empty journal; the lock is free, because Windows keeps open files."""
    with suppress(OSError):  # another process looks at it just now, and removes it then
        (folder / LOCK).unlink(missing_ok=True)
        folder.rmdir()


class EventLog:
    """The log of a process; any thread may append. `journal`: for MLflow; None where there is none."""

    def __init__(self, journal: Journal | None = None) -> None:
        self.journal = journal
        self.lost, self.problem = 0, ""  # records that found no room in the journal, and why the last did not
        self.run, self.models = "", ""
        self.running: set[str] = set()  # stages
        self._keys: dict[str, str] = {}  # every stage that began -> key
        self._open = False  # a run has begun and not ended
        self._closed = False
        self._segments: dict[str, Segments] = {}  # of stages
        self._writer = journal_name() if journal is None else journal.folder.name  # again that of before, if it died
        self._lock = threading.Lock()

    def append(self, event: events.Event, *, time_ms: int | None = None) -> None:
        """Write an event, which outlives the process. Raises ValueError for a quote in a name.
        Drops what comes after the end, and the end of a stage that never began."""
        with self._lock:
            if self._closed:
                return
            self._follow(event)
            stage = getattr(event, "stage", "")
            key = self._keys.get(stage, "")
            if isinstance(event, events.StageEnded) and not key:
                return
            record = LogEntry(time_ms or time.time_ns() // 1_000_000, self.run, self.models, key, event)
            if self.journal is not None and not isinstance(event, events.Progress):
                try:
                    self.journal.append(record.line())
                except OSError as error:
                    self.lost, self.problem = self.lost + 1, f"{self.journal.folder}: {error.strerror}"
            if stage in self._segments:
                self._segments[stage].append(record)

    def resume(self) -> Iterator[LogEntry]:
        """Yields the journal's records, written before this process began, and tracks run and stages by them."""
        assert self.journal is not None
        for record in self.journal.records():
            self._follow(record.event)
            if record.stage in self._segments:
                self._segments[record.stage].append(record)
            if isinstance(record.event, events.RunEnded):
                # MLflow's answer is lost with the process that asked; asking again changes nothing.
                self.journal.mark(0)
            yield record

    def _follow(self, event: events.Event) -> None:
        match event:
            case events.RunStarted(run, _, _, tags):
                if "'" in run or "`" in run:
                    raise ValueError(f"a run's name can't hold quotes: {run}")
                self.run, self.models, self._open = run, tags["name"], True
                if self.journal is not None and "storage" in tags and self.journal.place is None:
                    with suppress(StoreError):  # a name that is none of a folder
                        self.journal.place = place_of(Store(tags["storage"]), run).join(self.journal.folder.name)
            case events.StageStarted(stage, key, _, _, root):
                self._keys[stage] = key
                self.running.add(stage)
                if root and stage not in self._segments:
                    self._segments[stage] = Segments(Store(root).join(LOG), self._writer)
            case events.StageCached(stage, artifact):
                self._keys[stage] = artifact.key
                self.running.discard(stage)
            case events.StageEnded(stage):
                self.running.discard(stage)
            case events.RunEnded():
                self._open = False

    def end(self, status: events.Status, promote: events.Promote = "better", *, time_ms: int | None = None) -> None:
        """End the running stages, the run, and the log."""
        for stage in sorted(self.running):
            self.append(events.StageEnded(stage, "KILLED"), time_ms=time_ms)
        if self._open:
            self.append(events.RunEnded(status, promote), time_ms=time_ms)
        self._closed = True

    def end_killed(self) -> None:
        """End the run and stages of a killed process as KILLED, at the time of the last record."""
        assert self.journal is not None
        last = 0
        for record in self.journal.records():
            last = record.time
            self._follow(record.event)
        self.end("KILLED", time_ms=last)

    def store(self, stage: str, *, older_than: float = 0.0) -> None:
        """Copy a stage's lines to storage, if the last copy is older than some seconds. Raises StoreError."""
        with self._lock:
            segments = self._segments.get(stage)
            if segments is not None and time.monotonic() - segments.written >= older_than:
                segments.write()


@dataclass
class Segments:
    """Lines of a stage by a single writer, on the way to storage."""

    place: Store
    writer: str
    number: int = 0
    lines: list[bytes] = field(default_factory=list)  # of the segment that is not full
    new: bool = False  # some of them are not in storage
    written: float = float("-inf")  # by the clock of time.monotonic

    def append(self, record: LogEntry) -> None:
        """Add a warning, or a record's points without those that only MLflow shows."""
        event = record.event
        if isinstance(event, events.Metrics):
            values = {name: value for name, value in event.values.items() if not name.startswith(SYSTEM)}
            event = event._replace(values=values)
        if isinstance(event, events.Warning) or (isinstance(event, events.Metrics) and event.values):
            self.lines.append(record._replace(event=event).line())
            self.new = True

    def write(self) -> None:
        if not self.new:
            return
        self.written = time.monotonic()
        data = b"".join(self.lines)
        self.place.write(f"{self.writer}-{self.number:06d}.jsonl", data)
        self.new = False
        if len(data) >= SEGMENT_BYTES:
            self.number, self.lines = self.number + 1, []


def place_of(root: Store, run: str) -> Store:
    """The folder of what MLflow lacks of a run, a folder for each journal. Raises StoreError."""
    return root.join("runs", run, UNDELIVERED)


def stage_records(stage: Store) -> list[LogEntry]:
    """Entries in the segments of a stage, in order of time. Raises StoreError."""
    files = [info.path for info in stage.list(LOG) if info.path.endswith(".jsonl")]
    lines = (line for data in in_parallel(stage.read, files) for line in data.splitlines())
    return sorted(map(LogEntry.read, lines), key=lambda entry: entry.time)


def stage_warnings(stage: Store) -> list[str]:
    """Warnings of a stage, each line once, in order of time. Raises StoreError."""
    warnings = (entry.event.line for entry in stage_records(stage) if isinstance(entry.event, events.Warning))
    return list(dict.fromkeys(warnings))


def stage_points(stage: Store) -> dict[int, dict[str, float]]:
    """Values of a stage's metrics by step; a try that resumed replaces the steps that it repeats."""
    points: dict[int, dict[str, float]] = {}
    for record in stage_records(stage):
        if isinstance(record.event, events.Metrics):
            points.setdefault(record.event.step, {}).update(record.event.values)
    return dict(sorted(points.items()))
