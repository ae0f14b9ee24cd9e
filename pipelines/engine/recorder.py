"""The run's one recorder: an actor on the driver's node to which every stage and worker reports.

It keeps the state that the live table shows, the curves that the report draws, and the only connection to MLflow.
"""

import contextlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from components.runtime import events
from components.runtime.measures import MEASURES, measures_of
from components.runtime.storage.store import Store, StoreError

if TYPE_CHECKING:
    from components.runtime.tracking.tracker import Tracker

EXPERIMENT = "image-cascade"
CURVE_SECONDS = 20.0  # between two saves while a stage trains
HELD = "checkpoint_hold_seconds"
TIME = "time"  # of a point of a curve in storage, milliseconds since 1970: no metric


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


@dataclass
class Curve:
    """Points of one training stage, kept next to its manifest so that a later run can draw them."""

    store: Store
    points: dict[int, dict[str, float]] = field(default_factory=dict)
    saved: float = 0.0

    def load(self) -> None:
        """Take up the points of an earlier try. A try that resumes overwrites the steps that it repeats."""
        with contextlib.suppress(FileNotFoundError):
            self.points = {int(step): values for step, values in json.loads(self.store.read("curve.json")).items()}

    def add(self, step: int, values: dict[str, float], *, time_ms: int) -> None:
        self.points.setdefault(step, {}).update(values | {TIME: time_ms})

    def values(self) -> list[dict[str, float]]:
        """Of each step, in order."""
        return [self.points[step] for step in sorted(self.points)]

    def known(self) -> list[events.Point]:
        """All points, as a tracker takes them: one that arrives twice has the time that it had, so it is one point."""
        return [
            (name, step, value, int(values.get(TIME, events.now_ms())))
            for step, values in self.points.items()
            for name, value in values.items()
            if name != TIME
        ]

    def save(self) -> None:
        """Raises StoreError."""
        self.saved = time.monotonic()
        if self.points:
            self.store.write("curve.json", json.dumps(self.points).encode())


class RunRecorder:
    """Body of the actor; plain Python, so that tests use it without Ray."""

    def __init__(self, *, root: str, run: str, tracking: str | None, spool: str = "") -> None:
        self.root, self.run = Store(root), run
        self.tracker = None if tracking is None else new_tracker(tracking, spool)
        self.stages: dict[str, StageStatus] = {}
        self.curves: dict[str, Curve] = {}
        self.warnings: list[str] = []

    def emit(self, event: events.Event) -> None:
        """Bring table and curves up to date; MLflow gets the event, or what its handler returns in its place."""
        handle = HANDLERS.get(type(event))
        instead = handle(self, event) if handle else None
        if self.tracker is not None:
            self.tracker.emit(instead or event)

    def _planned(self, event: events.StagePlanned) -> None:
        self.stages[event.stage] = StageStatus(name=event.stage, key=event.key)

    def _held(self, event: events.StageHeld) -> None:
        self._set(event.stage, state=event.state, note=event.note)

    def _started(self, event: events.StageStarted) -> events.Event:
        self._set(event.stage, state="running", note="starting", started=time.time())
        curve = self.curves[event.stage] = Curve(self.root.join("stages", event.stage, event.key))
        curve.load()
        self._set(event.stage, measures=measures_of(curve.values()))  # of an earlier try
        return event._replace(points=curve.known())

    def _cached(self, event: events.StageCached) -> events.Event | None:
        self._set(event.stage, state="cached")
        if self.tracker is None or event.artifact.provenance.get("run") != self.run:
            return None
        curve = Curve(self.root.join("stages", event.stage, event.artifact.key))
        curve.load()  # points of a driver that may be gone, with what it had not sent
        return event._replace(points=curve.known())

    def _ended(self, event: events.StageEnded) -> None:
        state = "done" if event.status == "FINISHED" else "failed"
        self._set(event.stage, state=state, note=event.error, finished=time.time())
        self._save_curve(event.stage)

    def _progress(self, event: events.Progress) -> None:
        changed = {name: value for name, value in event._asdict().items() if name != "stage" and value is not None}
        self._set(event.stage, note="", **changed)
        if event.unit == "step" and event.step == event.total:  # before the stage commits, and may be cached
            self._save_curve(event.stage)

    def _metrics(self, event: events.Metrics) -> events.Event:
        """The curve has the very points that MLflow gets: sent again, they are none that are new."""
        time_ms = events.now_ms()
        kept = {name: value for name, value in event.values.items() if not name.startswith("system/")}
        if event.stage in self.curves and kept:
            self.curves[event.stage].add(event.step, kept, time_ms=time_ms)
            if time.monotonic() - self.curves[event.stage].saved > CURVE_SECONDS:
                self._save_curve(event.stage)
            self._measure(self.stages[event.stage].measures, kept)
        return event._replace(time_ms=time_ms)

    @staticmethod
    def _measure(known: dict[str, float], values: Mapping[str, float]) -> None:
        """Take up new measures: what checkpoints cost is that of the whole training, all else is that of now."""
        told = {name: value for name, value in values.items() if name in MEASURES}
        if HELD in told:
            told[HELD] += known.get(HELD, 0.0)
        known |= told

    def _warned(self, event: events.Warning) -> events.Event:
        """MLflow gets all of the stage's warnings as one text."""
        self.warnings.append(f"{event.stage}: {event.line}")
        self.stages[event.stage].warnings += (event.line,)
        said = [line for line in self.warnings if line.startswith(f"{event.stage}: ")]
        return events.Text(event.stage, "warnings.txt", "\n".join(said))

    def _set(self, stage: str, **values: Any) -> None:
        for name, value in values.items():
            setattr(self.stages[stage], name, value)

    def snapshot(self) -> list[StageStatus]:
        return list(self.stages.values())

    def close(self, status: events.Status, promote: events.Promote = "better") -> list[str]:
        """End the run; returns warnings for the user (MLflow away: what will be sent later).

        If it is FINISHED, MLflow's aliases move to this run's models where these are better.
        """
        for name in self.curves:
            self._save_curve(name)
        if self.tracker is None:
            return self.warnings
        return self.warnings + self.tracker.close(status, promote=promote)

    def promotion(self) -> list[str] | None:
        """Lines that say what became of the models of a run that ended well; None while MLflow has not heard of it."""
        promotion = None if self.tracker is None else self.tracker.promotion
        return None if promotion is None else [line for each in promotion for line in each.lines()]

    def _save_curve(self, name: str) -> None:
        """A storage that takes nothing more fails the stages; here it only costs the next report its curves."""
        if name not in self.curves:
            return
        try:
            self.curves[name].save()
        except StoreError as error:
            line = f"{name}: its curves are not kept: {error}"
            self.warnings += [line] if line not in self.warnings else []


def new_tracker(tracking: str, spool: str) -> "Tracker":
    # Not at the top: stages and workers import this module too, and MLflow costs each of them 45 MB and a second.
    from components.runtime.tracking.tracker import Tracker

    return Tracker(tracking, experiment=EXPERIMENT, spool=Path(spool))


@dataclass(frozen=True)
class ActorRecorder:
    """The recorder as stages see it: sends and forgets, so that no stage ever waits for tracking."""

    actor: Any

    def emit(self, event: events.Event) -> None:
        with contextlib.suppress(ray.exceptions.RayError):
            self.actor.emit.remote(event)


HANDLERS: dict[type, Callable[[RunRecorder, Any], events.Event | None]] = {  # of what table and curves show
    events.StagePlanned: RunRecorder._planned,
    events.StageHeld: RunRecorder._held,
    events.StageStarted: RunRecorder._started,
    events.StageCached: RunRecorder._cached,
    events.StageEnded: RunRecorder._ended,
    events.Progress: RunRecorder._progress,
    events.Metrics: RunRecorder._metrics,
    events.Warning: RunRecorder._warned,
}
