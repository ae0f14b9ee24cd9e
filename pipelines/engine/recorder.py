"""The run's one recorder: an actor on the driver's node to which every stage and worker reports.

It keeps the log, of which the report draws curves, the state of the live table, and the only connection to MLflow.
"""

import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from components.runtime import events
from components.runtime.measures import MEASURES, measures_of
from components.runtime.storage.store import Store, StoreError
from components.runtime.tracking.event_log import EventLog, stage_points

if TYPE_CHECKING:
    from components.runtime.tracking.tracker import Tracker

EXPERIMENT = "image-cascade"
STORE_SECONDS = 20.0  # between two writes to storage while a stage trains
HELD = "checkpoint_hold_seconds"


@dataclass
class StageStatus:
    """What the live table shows of one stage."""

    name: str
    key: str
    state: str = "waiting"  # waiting, queued, running, done, cached, failed, skipped
    step: int = 0
    total: int = 0
    unit: str = "step"
    rate: float | None = None
    loss: float | None = None
    started: float | None = None
    finished: float | None = None
    note: str = ""
    warnings: tuple[str, ...] = ()  # all that came
    measures: dict[str, float] = field(default_factory=dict)  # of a training, as its last log has them

    @property
    def seconds(self) -> float | None:
        if self.started is None:
            return None
        return (self.finished or time.time()) - self.started

    @property
    def eta(self) -> float | None:
        """Seconds to go, as the last rate has it."""
        return (self.total - self.step) / self.rate if self.rate and self.total > self.step else None


class RunRecorder:
    """Body of the actor; plain Python, so that tests use it without Ray.

    Args:
        tracking: address of MLflow; None: nothing is sent.
        spool: local folder of the journals for MLflow.
    """

    def __init__(self, *, tracking: str | None = None, spool: str = "") -> None:
        self.tracker: Tracker | None = None
        self.log = EventLog()
        if tracking is not None:
            # Not at the top: stages and workers import this module too, and MLflow costs each 45 MB and a second.
            from components.runtime.tracking import tracker

            self.tracker = tracker.Tracker(tracking, experiment=EXPERIMENT, spool=Path(spool))
            self.log = self.tracker.log
        self.stages: dict[str, StageStatus] = {}
        self.warnings: list[str] = []

    def emit(self, event: events.Event) -> None:
        """Append an event to the log, which MLflow and the report read, and bring the table up to date."""
        self.log.append(event)
        if handle := HANDLERS.get(type(event)):
            handle(self, event)

    def _planned(self, event: events.StagePlanned) -> None:
        self.stages[event.stage] = StageStatus(name=event.stage, key=event.key)

    def _held(self, event: events.StageHeld) -> None:
        self._set(event.stage, state=event.state, note=event.note)

    def _started(self, event: events.StageStarted) -> None:
        self._set(event.stage, state="running", note="starting", started=time.time())
        if event.root:
            self._store(event.stage)
            earlier = stage_points(Store(event.root))
            self._set(event.stage, measures=measures_of(list(earlier.values())))

    def _cached(self, event: events.StageCached) -> None:
        self._set(event.stage, state="cached")

    def _ended(self, event: events.StageEnded) -> None:
        state = "done" if event.status == "FINISHED" else "failed"
        self._set(event.stage, state=state, note=event.error, finished=time.time())
        self._store(event.stage)

    def _progress(self, event: events.Progress) -> None:
        changed = {name: value for name, value in event._asdict().items() if name != "stage" and value is not None}
        self._set(event.stage, note="", **changed)
        if event.unit == "step" and event.step == event.total:  # before the stage commits, and may be cached
            self._store(event.stage)

    def _metrics(self, event: events.Metrics) -> None:
        if event.stage in self.stages:
            self._store(event.stage, older_than=STORE_SECONDS)
            self._measure(self.stages[event.stage].measures, event.values)

    @staticmethod
    def _measure(measures: dict[str, float], values: Mapping[str, float]) -> None:
        """Take up new measures: the cost of checkpoints is that of the whole training, all others are the latest."""
        latest = {name: value for name, value in values.items() if name in MEASURES}
        if HELD in latest:
            latest[HELD] += measures.get(HELD, 0.0)
        measures |= latest

    def _warned(self, event: events.Warning) -> None:
        """Show a warning, and give MLflow all of the stage's warnings as one text."""
        self.warnings.append(f"{event.stage}: {event.line}")
        self.stages[event.stage].warnings += (event.line,)
        lines = [line for line in self.warnings if line.startswith(f"{event.stage}: ")]
        self.log.append(events.Text(event.stage, "warnings.txt", "\n".join(lines)))

    def _set(self, stage: str, **values: Any) -> None:
        for name, value in values.items():
            setattr(self.stages[stage], name, value)

    def snapshot(self) -> list[StageStatus]:
        return list(self.stages.values())

    def close(self, status: events.Status, promote: events.Promote = "better") -> list[str]:
        """End the run; returns warnings for the user (MLflow away: what will be sent later).

        If it is FINISHED, MLflow's aliases move to this run's models where these are better.
        """
        for stage in self.stages:
            self._store(stage)
        if self.tracker is None:
            return self.warnings
        return self.warnings + self.tracker.close(status, promote=promote)

    def promotion(self) -> list[str] | None:
        """Lines that say what became of the models of a run that ended well; None while MLflow has not heard of it."""
        promotion = None if self.tracker is None else self.tracker.promotion
        return None if promotion is None else [line for each in promotion for line in each.lines()]

    def pages(self) -> dict[str, str]:
        """Addresses of MLflow's pages of the run and of its model's version; empty where there are none."""
        return {} if self.tracker is None else self.tracker.pages

    def _store(self, stage: str, *, older_than: float = 0.0) -> None:
        """A storage that takes nothing more fails the stages; here it only costs the next report its curves."""
        try:
            self.log.store(stage, older_than=older_than)
        except StoreError as error:
            line = f"{stage}: its curves are not kept: {error}"
            self.warnings += [line] if line not in self.warnings else []


@dataclass(frozen=True)
class ActorRecorder:
    """The recorder as stages see it: sends and forgets, so that no stage ever waits for tracking."""

    actor: Any

    def emit(self, event: events.Event) -> None:
        with contextlib.suppress(ray.exceptions.RayError):
            self.actor.emit.remote(event)


HANDLERS: dict[type, Callable[[RunRecorder, Any], None]] = {  # of events that the table shows
    events.StagePlanned: RunRecorder._planned,
    events.StageHeld: RunRecorder._held,
    events.StageStarted: RunRecorder._started,
    events.StageCached: RunRecorder._cached,
    events.StageEnded: RunRecorder._ended,
    events.Progress: RunRecorder._progress,
    events.Metrics: RunRecorder._metrics,
    events.Warning: RunRecorder._warned,
}
