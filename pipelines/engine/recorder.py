"""The run's single recorder: an actor on the driver's node for reports of stages and workers.

It keeps the log, the state of the live table, gauges for Prometheus, and the only connection to MLflow.
"""

import contextlib
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.util.metrics import Gauge

from components.runtime import events
from components.runtime.events import MEASURES, measures_of
from components.runtime.storage.store import Store, StoreError
from components.runtime.tracking.event_log import EventLog, stage_points

if TYPE_CHECKING:
    from components.runtime.tracking.tracker import Tracker

EXPERIMENT = "image-cascade"
STORE_SECONDS = 20.0  # between two writes to storage while a stage trains
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


class RunRecorder(events.Recorder):
    """Body of the actor; plain Python, for tests without Ray.
    `tracking`: address of MLflow; None: nothing is sent. `spool`: local folder of the journals for MLflow."""

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
        self.gauges = {name: Gauge(f"cascade_train_{name}", title, ("run", "stage")) for name, title in GAUGES.items()}

    def emit(self, event: events.Event) -> None:
        """Append an event to the log, which MLflow and the report read, and update the table."""
        self.log.append(event)
        if stage := getattr(event, "stage", ""):
            self._show(self.stages.setdefault(stage, StageStatus(stage)), event)

    def _show(self, status: StageStatus, event: events.Event) -> None:
        match event:
            case events.StageHeld(_, state, note):
                status.state, status.note = state, note
            case events.StageStarted(root=root):
                status.state, status.note = "running", "starting"
                status.started = status.saved = time.time()
                if root:
                    self._store(status.name)
                    status.measures = measures_of(list(stage_points(Store(root)).values()))  # of earlier tries
            case events.StageCached():
                status.state = "cached"
            case events.StageEnded(_, ended, _, error):
                status.state = "done" if ended == "FINISHED" else "failed"
                status.note, status.finished = error, time.time()
                self._store(status.name)
            case events.Progress(_, step, total, unit, rate, loss):
                status.note, status.step, status.total, status.unit = "", step, total, unit
                status.rate = status.rate if rate is None else rate
                status.loss = status.loss if loss is None else loss
                if unit == "step":  # each time, as Ray forgets gauges in 20 s
                    figures = {"step": step, "loss": status.loss, "checkpoint_age_seconds": time.time() - status.saved}
                    for name, value in (status.measures | figures).items():
                        self.gauges[name].set(value, {"run": self.log.run, "stage": status.name})
                    if step == total:  # before the stage commits, and may be cached
                        self._store(status.name)
            case events.Metrics(values=values):
                latest = {name: value for name, value in values.items() if name in MEASURES}
                if HELD in latest:  # the cost of checkpoints is that of the whole training
                    latest[HELD] += status.measures.get(HELD, 0.0)
                    status.saved = time.time()
                status.measures |= latest
                self._store(status.name, older_than=STORE_SECONDS)
            case events.Warning(stage, line):
                self.warnings.append(f"{stage}: {line}")
                status.warnings += (line,)
                lines = [line for line in self.warnings if line.startswith(f"{stage}: ")]
                self.log.append(events.Text(stage, "warnings.txt", "\n".join(lines)))

    def snapshot(self) -> list[StageStatus]:
        return list(self.stages.values())

    def close(self, status: events.Status, promote: events.Promote = "better") -> list[str]:
        """End the run; returns warnings for the user, such as MLflow away and data to be sent later.
        If it is FINISHED, MLflow's aliases move to this run's models where these are better."""
        for stage in self.stages:
            self._store(stage)
        return self.warnings + ([] if self.tracker is None else self.tracker.close(status, promote=promote))

    def result(self) -> tuple[list[str] | None, dict[str, str]]:
        """Lines about the champions of a finished run, and the addresses of MLflow's pages of run and model.
        The lines are None until MLflow has received the run's end, pages are missing until it has them."""
        if self.tracker is None or (delivery := self.tracker.delivery) is None:
            return None, {}
        promotions = delivery.promotions.get(self.log.run)
        lines = None if promotions is None else [line for each in promotions for line in each.lines()]
        return lines, delivery.pages(self.log.run)

    def _store(self, stage: str, *, older_than: float = 0.0) -> None:
        """Copy a stage's log to storage; a full one costs the next report its curves, and nothing else."""
        try:
            self.log.store(stage, older_than=older_than)
        except StoreError as error:
            line = f"{stage}: its curves are not kept: {error}"
            self.warnings += [line] if line not in self.warnings else []


@dataclass(frozen=True)
class ActorRecorder(events.Recorder):
    """The recorder's side at the stages: sends events without waiting for tracking."""

    actor: Any

    def emit(self, event: events.Event) -> None:
        with contextlib.suppress(ray.exceptions.RayError):
            self.actor.emit.remote(event)
