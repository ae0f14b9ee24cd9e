"""The run's single recorder: an actor on the driver's node for reports of stages and workers.

It keeps the log, the state of the live table, gauges for Prometheus, and the only connection to MLflow. When it dies
(is killed, memory runs out) Ray starts it again, and sends again what it had not taken; its journal has the rest.
"""

import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import ray
from ray.util.metrics import Gauge

from components.evaluation.measures import MEASURES, measures_of
from components.runtime import events
from components.runtime.pool import one_line
from components.runtime.storage import outages
from components.runtime.storage.store import Store, StoreError
from components.runtime.tracking.event_log import EventLog, left_journals, open_journal, stage_points

if TYPE_CHECKING:
    from components.runtime.tracking.tracker import Tracker

EXPERIMENT = "image-cascade"
STORE_SECONDS = 20.0  # between two writes to storage while a stage trains
ANSWER_SECONDS, CLOSE_SECONDS = 60.0, 240.0  # for an answer; while the rest is sent
FORGOTTEN_SECONDS = 120.0  # after which a waiting process is believed to be gone
STARTING = "starting"  # the note of a stage that has said nothing yet
HELD = "checkpoint_hold_seconds"
GAUGES = {name: measure.title for name, measure in MEASURES.items()} | {  # of a training -> title
    "step": "steps taken",
    "loss": "the last one reported",
    "checkpoint_age_seconds": "since a log said that training was saved, or since its start",
}


@dataclass
class StageStatus:
    """A stage in the live table."""

    name: str
    state: str = "waiting"  # waiting, queued, running, done, cached, failed, skipped
    step: int = 0
    total: int = 0
    unit: str = "step"
    rate: float | None = None
    loss: float | None = None
    started: float | None = None
    finished: float | None = None
    saved: float = field(default_factory=time.time)  # of the last checkpoint, or the start
    note: str = ""
    warnings: tuple[str, ...] = ()  # all that came
    measures: dict[str, float] = field(default_factory=dict)  # of a training, as its last log has them

    @property
    def seconds(self) -> float | None:
        return None if self.started is None else (self.finished or time.time()) - self.started

    @property
    def eta(self) -> float | None:
        """Seconds to go, at the latest speed."""
        return (self.total - self.step) / self.rate if self.rate and self.total > self.step else None


class Closing(NamedTuple):
    """The answer of a recorder to the end of a run."""

    warnings: Sequence[str]  # for the user, such as MLflow away
    promotion: Sequence[str] = ()  # lines about the champion
    pages: Mapping[str, str] = MappingProxyType({})  # addresses of run and model in MLflow
    undelivered: str = ""  # why MLflow lacks a part of the run that decides on its models
    unregistered: Sequence[str] = ()  # names of models in that part
    lost: int = 0  # records that found no room on disk
    silent: bool = False  # whether the recorder gave no answer, so that nobody knows what MLflow has


class RunRecorder(events.Recorder):
    """Body of the actor; plain Python, for tests without Ray.
    `tracking`: address of MLflow; None: nothing is sent. `spool`: local folder of the journals. `journal`: name of the
    own, which is there already if a recorder died. `begun`: the run, whose start is said where no journal says it."""

    def __init__(
        self,
        *,
        tracking: str | None = None,
        spool: str = "",
        journal: str = "",
        begun: events.RunStarted | None = None,
    ) -> None:
        self.tracker: Tracker | None = None
        self.log = EventLog()
        self.stages: dict[str, StageStatus] = {}
        self.warnings: list[str] = []
        self.away: dict[str, tuple[float, str]] = {}  # store -> when its absence was said, and the words
        self.gauges = {name: Gauge(f"cascade_train_{name}", title, ("run", "stage")) for name, title in GAUGES.items()}
        try:
            if tracking is not None:
                # Not at the top: stages and workers import this module too, and MLflow costs each 45 MB and a second.
                from components.runtime.tracking import tracker

                self.tracker = tracker.Tracker(tracking, experiment=EXPERIMENT, spool=Path(spool), journal=journal)
                self.log = self.tracker.log
            elif spool:
                self.log = EventLog(open_journal(Path(spool), destination={}, name=journal))
                for left in left_journals(Path(spool), destination={}):  # of killed drivers
                    left.discard()
        except OSError as error:  # without MLflow a journal serves only a recorder that dies
            if tracking is not None:
                self.log.problem = str(error.strerror)
                self._warn(f"MLflow gets nothing of this run: no journal in {spool} ({self.log.problem})")
        if self.log.journal is not None:
            self._resume()
        if begun is not None and not self.log.run:
            self.log.append(begun)

    def _resume(self) -> None:
        """Take over the state of a recorder that died, if there was one, from its journal."""
        for record in self.log.resume():
            if isinstance(record.event, events.Warning):
                self.warnings.append(f"{record.stage}: {record.event.line}")
            if record.stage and not isinstance(record.event, events.Metrics):  # storage has these
                self._show(self.stages.setdefault(record.stage, StageStatus(record.stage)), record.event, record.time)
        if self.log.run:
            self._warn("the run's recorder died (was it killed, was memory short?) and went on from its journal")

    def emit(self, event: events.Event) -> None:
        """Append an event to the log, which MLflow and the report read, and update the table.
        A warning that is there already is dropped: Ray may send it again to a recorder that died."""
        warning = f"{event.stage}: {event.line}" if isinstance(event, events.Warning) else None
        if warning in self.warnings:
            return
        lost = self.log.lost
        self.log.append(event)
        if stage := getattr(event, "stage", ""):
            status = self.stages.setdefault(stage, StageStatus(stage))
            self._show(status, event, int(1000 * time.time()))
            if self.log.lost > lost == 0 and self.tracker is not None:
                status.warnings += (f"no room for the journal ({self.log.problem}): MLflow lacks what it can't hold",)
        if warning is not None:
            self.warnings.append(warning)
            lines = [line for line in self.warnings if line.startswith(f"{stage}: ")]
            self.log.append(events.Text(stage, "warnings.txt", "\n".join(lines)))

    def _warn(self, line: str) -> None:
        self.warnings += [line] if line not in self.warnings else []

    def _show(self, status: StageStatus, event: events.Event, time_ms: int) -> None:
        now = time_ms / 1000
        match event:
            case events.StageHeld(_, state, note):
                status.state, status.note = state, note
            case events.StageStarted(root=root):
                status.state, status.note = "running", STARTING
                status.started = status.saved = now
                if root:
                    self._store(status.name)
                    with contextlib.suppress(StoreError):
                        status.measures = measures_of(list(stage_points(Store(root)).values()))  # of earlier tries
            case events.StageCached():
                status.state = "cached"
            case events.StageEnded(_, ended, _, error):
                status.state = "done" if ended == "FINISHED" else "failed"
                status.note, status.finished = error, now
                self._store(status.name)
            case events.Progress(_, step, total, unit, rate, loss):
                status.note, status.step, status.total, status.unit = "", step, total, unit
                status.rate = status.rate if rate is None else rate
                status.loss = status.loss if loss is None else loss
                if unit == "step":  # each time, as Ray forgets gauges in 20 s
                    figures = {"step": step, "loss": status.loss, "checkpoint_age_seconds": now - status.saved}
                    for name, value in (status.measures | figures).items():
                        self.gauges[name].set(value, {"run": self.log.run, "stage": status.name})
                    if step == total:  # before the stage commits, and may be cached
                        self._store(status.name)
            case events.Metrics(values=values):
                latest = {name: value for name, value in values.items() if name in MEASURES}
                if HELD in latest:  # the cost of checkpoints is that of the whole training
                    latest[HELD] += status.measures.get(HELD, 0.0)
                    status.saved = now
                status.measures |= latest
                self._store(status.name, older_than=STORE_SECONDS)
            case events.Warning(line=line):
                status.warnings += (line,)

    def waits(self, store: str, line: str, *, ended: bool) -> None:
        """Show that a process of the run waits for a store, or keep as a warning that it did."""
        if not ended:
            self.away[store] = (time.monotonic(), line)
        elif self.away.pop(store, None) is not None:
            self.warnings.append(line)

    def snapshot(self) -> list[StageStatus]:
        """All stages for the table; those at work say which store is waited for."""
        held = ("running", "queued") if (lines := self._waited_for()) else ()
        return [replace(each, note=lines[0]) if each.state in held else each for each in self.stages.values()]

    def _waited_for(self) -> list[str]:
        return [line for said, line in self.away.values() if time.monotonic() - said < FORGOTTEN_SECONDS]

    def close(self, status: events.Status, promote: events.Promote = "better") -> Closing:
        """End the run, and send the rest.
        If it is FINISHED, MLflow's aliases move to this run's models where these are better."""
        for stage in self.stages:
            self._store(stage)
        if (tracker := self.tracker) is None:
            self.log.end(status, promote)
            if self.log.journal is None:  # or it served a recorder that dies, and MLflow lacks nothing
                return Closing(self.warnings, undelivered=self.log.problem)
            self.log.journal.discard()
            return Closing(self.warnings)
        warnings = list(dict.fromkeys(self.warnings + tracker.close(status, promote=promote)))
        if self.log.lost:
            why = f"for which its journal had no room ({self.log.problem})"
            again = "make room and run the same command again: it trains nothing again, and sends what storage has"
            warnings.append(f"MLflow lacks {self.log.lost} records of this run, {why}; {again}")
        left = {"undelivered": tracker.undelivered, "unregistered": tracker.unregistered, "lost": self.log.lost}
        if (delivery := tracker.delivery) is None:
            return Closing(warnings, **left)
        made = delivery.promotions.get(self.log.run)
        return Closing(warnings, made.lines() if made else (), delivery.pages(self.log.run), **left)

    def _store(self, stage: str, *, older_than: float = 0.0) -> None:
        """Copy a stage's log to storage; a full one costs the next report its curves, and nothing else."""
        if older_than and self._waited_for():
            return
        try:
            with outages.hurried():  # nothing else is heard meanwhile
                self.log.store(stage, older_than=older_than)
        except StoreError as error:
            self._warn(f"{stage}: its curves are not kept: {error}")


class ActorRecorder(events.Recorder):
    """The recorder's side at driver, stages and workers; never raises, whatever becomes of the actor."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor
        self.sent = list[Any]()  # by this process, and not in the journal yet

    def __reduce__(self) -> tuple[Any, ...]:
        return ActorRecorder, (self.actor,)

    def emit(self, event: events.Event, *, wait: bool = False) -> None:
        """Send an event without waiting for tracking; `wait` until it is in the journal, and all before it."""
        with contextlib.suppress(ray.exceptions.RayError):
            sent = [*self.sent, self.actor.emit.remote(event)]
            self.sent = ray.wait(sent, num_returns=len(sent), timeout=0)[1]
        if wait:
            self.settle()

    def settle(self) -> None:
        """Wait until the journal has every event of this process.
        Only the sender sends again to a recorder that died, so a process does not end before."""
        with contextlib.suppress(ray.exceptions.RayError):
            ray.get(self.sent, timeout=ANSWER_SECONDS)

    def snapshot(self, before: list[StageStatus]) -> list[StageStatus]:
        """All stages for the table; those of `before` from a recorder that does not answer."""
        try:
            return ray.get(self.actor.snapshot.remote(), timeout=ANSWER_SECONDS)
        except ray.exceptions.RayError:
            return before

    def close(self, status: events.Status, promote: events.Promote = "better") -> Closing:
        """End the run and the recorder; a recorder that does not answer has sent only a part."""
        try:
            closing = ray.get(self.actor.close.remote(status, promote), timeout=CLOSE_SECONDS)
        except ray.exceptions.RayError as error:
            why = f"MLflow may lack something: the run's recorder does not answer ({one_line(error)})"
            closing = Closing([f"{why}; run the same command again"], silent=True)
        with contextlib.suppress(ray.exceptions.RayError):
            ray.kill(self.actor)  # it is not to be started again
        return closing
