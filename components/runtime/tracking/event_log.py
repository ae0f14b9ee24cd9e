"""The ordered log of a run's events.

{root}/stages/{stage}/{key}/log/{time}-{id}-{number}.jsonl    one writer's points and warnings of a stage, in segments
{spool}/…                                                     its journal, which holds all events until MLflow has them

Object storage can't append, so a segment is written whole until it is full, and then the next one begins. It lies with
the stage, for every run that finds the stage finished draws its curves. Segments leave out what only MLflow shows: the
machine's load, images and texts.
"""

import threading
import time
import uuid
from dataclasses import dataclass, field

from components.runtime import events
from components.runtime.events import LogEntry
from components.runtime.storage.artifact import LOG
from components.runtime.storage.store import Store, in_parallel
from components.runtime.tracking.journal import Journal
from components.runtime.tracking.names import SYSTEM

SEGMENT_BYTES = 2**20  # about the most that is written again when a line is added


class EventLog:
    """The log of a process; any thread may append.

    Args:
        journal: local file that holds all lines until MLflow has them; None where there is no MLflow.
    """

    def __init__(self, journal: Journal | None = None) -> None:
        self.journal = journal
        self.run, self.models = "", ""
        self.running: set[str] = set()  # stages
        self._keys: dict[str, str] = {}  # every stage that began -> key
        self._open = False  # a run has begun and not ended
        self._closed = False
        self._segments: dict[str, Segments] = {}  # of stages
        self._writer = f"{time.time_ns():020d}-{uuid.uuid4().hex[:8]}"
        self._lock = threading.Lock()

    def append(self, event: events.Event, *, time_ms: int | None = None) -> None:
        """Write an event; after the call the event outlives the process.

        Drops what comes after the end (a worker's last word), and the end of a stage that never began.
        Raises ValueError for a run's name with quotes in it.
        """
        with self._lock:
            if self._closed:
                return
            self._follow(event)
            stage = getattr(event, "stage", "")
            key = self._keys.get(stage, "")
            if isinstance(event, events.StageEnded) and not key:
                return
            record = LogEntry(time_ms or events.now_ms(), self.run, self.models, key, event)
            if self.journal is not None and not isinstance(event, events.Progress):
                self.journal.append(record.line())
            if stage in self._segments and (stored := _stored(record)) is not None:
                self._segments[stage].append(stored.line())

    def _follow(self, event: events.Event) -> None:
        """Track the run, the keys of its stages, and the running stages."""
        match event:
            case events.RunStarted(run, _, _, tags):
                if "'" in run or "`" in run:
                    raise ValueError(f"a run's name can't hold quotes: {run}")
                self.run, self.models, self._open = run, tags["name"], True
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
        """Copy a stage's lines to storage if the last copy is older than `older_than` seconds.

        Raises StoreError.
        """
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

    def append(self, line: bytes) -> None:
        self.lines.append(line)
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


def _stored(record: LogEntry) -> LogEntry | None:
    """The part of a record for segments."""
    if isinstance(record.event, events.Metrics):
        values = {name: value for name, value in record.event.values.items() if not name.startswith(SYSTEM)}
        return record._replace(event=record.event._replace(values=values)) if values else None
    return record if isinstance(record.event, events.Warning) else None


def stage_records(stage: Store) -> list[LogEntry]:
    """Entries in the segments of a stage, in order of time. Raises StoreError."""
    files = [info.path for info in stage.list(LOG) if info.path.endswith(".jsonl")]
    lines = (line for data in in_parallel(stage.read, files) for line in data.splitlines())
    return sorted(map(LogEntry.read, lines), key=lambda entry: entry.time)


def stage_points(stage: Store) -> dict[int, dict[str, float]]:
    """Values of a stage's metrics by step, in order of steps.

    A try that resumed replaces the steps that it repeats.
    """
    points: dict[int, dict[str, float]] = {}
    for record in stage_records(stage):
        if isinstance(record.event, events.Metrics):
            points.setdefault(record.event.step, {}).update(record.event.values)
    return dict(sorted(points.items()))
