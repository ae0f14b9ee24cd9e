"""The run's one recorder: an actor on the driver's node to which every stage and worker reports.

It keeps the state that the live table shows, the curves that the report draws, and the only connection to MLflow.
"""

import contextlib
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import ray

from components.storage.artifact import Artifact
from components.storage.store import Store, StoreError

if TYPE_CHECKING:
    from components.tracking.tracker import Point, Tracker

EXPERIMENT = "image-cascade"
CURVE_SECONDS = 20.0  # between two saves while a stage trains
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

    def known(self) -> "list[Point]":
        """All points, as a tracker takes them: one that arrives twice has the time that it had, so it is one point."""
        return [
            (name, step, value, int(values.get(TIME, now())))
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

    def start(self, *, recipe_yaml: str, parameters: dict[str, Any], tags: dict[str, str]) -> None:
        if self.tracker is not None:
            self.tracker.start_run(self.run, recipe_yaml=recipe_yaml, parameters=parameters, tags=tags)

    def expect(self, name: str, key: str) -> None:
        self.stages[name] = StageStatus(name=name, key=key)

    def stage_cached(self, name: str, artifact: Artifact) -> None:
        self.stages[name].state = "cached"
        if self.tracker is None:
            return
        curve = Curve(self.root.join("stages", name, artifact.key))
        if artifact.provenance.get("run") == self.run:  # by a driver that may be gone, with what it had not sent
            curve.load()
        self.tracker.stage_cached(name, artifact=artifact, points=curve.known())

    def stage_queued(self, name: str, note: str) -> None:
        status = self.stages[name]
        status.state, status.note = "queued", note

    def stage_started(self, name: str, *, config: dict[str, Any], inputs: dict[str, Artifact]) -> None:
        status = self.stages[name]
        status.state, status.note, status.started = "running", "starting", time.time()
        self.curves[name] = Curve(self.root.join("stages", name, status.key))
        self.curves[name].load()
        if self.tracker is not None:
            points = self.curves[name].known()
            self.tracker.start_stage(name, status.key, config=config, inputs=inputs, points=points)

    def stage_finished(self, name: str, artifact: Artifact | None, error: str = "") -> None:
        status = self.stages[name]
        status.state, status.note = ("failed", error) if artifact is None else ("done", "")
        status.finished = time.time()
        self._save_curve(name)
        if self.tracker is not None:
            status_name = "FAILED" if artifact is None else "FINISHED"
            self.tracker.end_stage(name, status=status_name, artifact=artifact, error=error)

    def stage_skipped(self, name: str, note: str) -> None:
        self.stages[name].state, self.stages[name].note = "skipped", note

    def progress(self, stage: str, **values: Any) -> None:
        status = self.stages[stage]
        status.note = ""
        for name, value in values.items():
            if value is not None:
                setattr(status, name, value)
        if status.unit == "step" and status.step == status.total:  # before the stage commits, and may be cached
            self._save_curve(stage)

    def metrics(self, stage: str, step: int, values: dict[str, float]) -> None:
        time_ms = now()
        if stage in self.curves and not all(name.startswith("system/") for name in values):
            kept = {name: value for name, value in values.items() if not name.startswith("system/")}
            self.curves[stage].add(step, kept, time_ms=time_ms)
            if time.monotonic() - self.curves[stage].saved > CURVE_SECONDS:
                self._save_curve(stage)
        if self.tracker is not None:
            self.tracker.log_metrics(stage, step, values, time_ms=time_ms)

    def image(self, stage: str, step: int, name: str, png: bytes) -> None:
        if self.tracker is not None:
            self.tracker.log_image(stage, step, name, png)

    def text(self, stage: str, name: str, content: str) -> None:
        """A text file of a stage, or of the run itself if `stage` is empty."""
        if self.tracker is not None:
            self.tracker.log_text(stage, name, content)

    def warning(self, stage: str, line: str) -> None:
        """What the user is to know though the run goes on: shown now, printed at the end, kept as a text."""
        self.warnings.append(f"{stage}: {line}")
        self.stages[stage].warnings += (line,)
        self.text(stage, "warnings.txt", "\n".join(w for w in self.warnings if w.startswith(f"{stage}: ")))

    def snapshot(self) -> list[StageStatus]:
        return list(self.stages.values())

    def close(self, status: Literal["FINISHED", "FAILED", "KILLED"]) -> list[str]:
        """End the run; returns warnings for the user (MLflow away: what will be sent later).

        If it is FINISHED, MLflow's aliases move to this run's models.
        """
        for name in self.curves:
            self._save_curve(name)
        if self.tracker is None:
            return self.warnings
        return self.warnings + self.tracker.end_run(status)

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
    from components.tracking.tracker import Tracker

    return Tracker(tracking, experiment=EXPERIMENT, spool=Path(spool))


def now() -> int:
    """Milliseconds since 1970."""
    return time.time_ns() // 1_000_000


@dataclass(frozen=True)
class ActorRecorder:
    """The recorder as stages see it: sends and forgets, so that no stage ever waits for tracking."""

    actor: Any

    def progress(self, stage: str, **values: Any) -> None:
        self._send("progress", stage, **values)

    def metrics(self, stage: str, step: int, values: dict[str, float]) -> None:
        self._send("metrics", stage, step, values)

    def image(self, stage: str, step: int, name: str, png: bytes) -> None:
        self._send("image", stage, step, name, png)

    def text(self, stage: str, name: str, content: str) -> None:
        self._send("text", stage, name, content)

    def warning(self, stage: str, line: str) -> None:
        self._send("warning", stage, line)

    def _send(self, method: str, *arguments: Any, **named: Any) -> None:
        with contextlib.suppress(ray.exceptions.RayError):
            getattr(self.actor, method).remote(*arguments, **named)
