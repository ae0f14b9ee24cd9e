"""The one door through which a workflow run tells MLflow what it does, in one process.

Every call writes a line to a journal on disk and returns; a thread sends the journal, about every ten seconds, as few
calls as MLflow allows. MLflow being away stops nothing and loses nothing: the journal waits, and what is left when the
run ends is sent by the next tracker that opens the same spool folder for the same MLflow.
"""

import logging
import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from mlflow.exceptions import MlflowException
from PIL import UnidentifiedImageError

from components.storage.artifact import Artifact, ArtifactError
from components.tracking.delivery import Delivery, as_document, coalesce
from components.tracking.journal import Event, Journal, left_journals, new_journal
from components.tracking.system import SystemMonitor

logger = logging.getLogger(__name__)
Status = Literal["FINISHED", "FAILED", "KILLED"]
Point = tuple[str, int, float, int]  # name, step, value, milliseconds since 1970
EVENTS_AT_ONCE = 5000
REFUSALS = ("BAD_REQUEST", "INVALID_PARAMETER_VALUE", "RESOURCE_ALREADY_EXISTS", "RESOURCE_DOES_NOT_EXIST")


class MlflowAwayError(Exception):
    """MLflow (or what it needs) is away; what was to be sent waits."""


class Tracker:
    """Parent and child runs, curves, images, lineage, models and machine load of one workflow run.

    Args:
        tracking_uri: of an MLflow server, or `sqlite:///…`.
        experiment: created if missing.
        spool: local folder of the journals; give the same one next time.
        flush_seconds: about how often points are sent.
    """

    def __init__(self, tracking_uri: str, *, experiment: str, spool: Path, flush_seconds: float = 10.0) -> None:
        destination = {"tracking_uri": tracking_uri, "experiment": experiment}
        left = left_journals(spool, destination=destination)
        self._journal = new_journal(spool, destination=destination)
        self._lock = threading.Lock()
        self._closed = False
        self._run, self._models = "", ""
        self._open: dict[str, str] = {}  # stages that run now -> key
        self._keys: dict[str, str] = {}  # every stage ever named -> key
        self._sender = Sender([*left, self._journal], flush_seconds=flush_seconds, before=self._sample_system)
        self._system = SystemMonitor()
        self._sender.start()

    def start_run(self, run: str, *, recipe_yaml: str, parameters: Mapping[str, Any], tags: Mapping[str, str]) -> None:
        """Begin the workflow run `run`, or take it up again. `tags` holds `name`, its models', and `git_commit`."""
        if "'" in run or "`" in run:
            raise ValueError(f"a run's name can't hold quotes: {run}")
        self._run, self._models = run, tags["name"]
        self._write("start_run", recipe_yaml=recipe_yaml, parameters=dict(parameters), tags=dict(tags))

    def start_stage(
        self,
        stage: str,
        key: str,
        *,
        config: Mapping[str, Any],
        inputs: Mapping[str, Artifact],
        points: Iterable[Point] = (),
    ) -> None:
        """Begin a stage's child run; a retry with the same key goes on in the one that is there.

        Args:
            points: those of earlier tries; what MLflow has not got, because a journal was lost, is sent again.
        """
        self._keys[stage] = self._open[stage] = key
        documents = [as_document(artifact) for artifact in inputs.values()]
        self._write("start_stage", stage, config=dict(config), inputs=documents, points=list(points))

    def stage_cached(self, stage: str, *, artifact: Artifact, points: Iterable[Point] = ()) -> None:
        """Show a stage that was not run, with a link to the run that made it. `points` as `start_stage` takes them."""
        self._open.pop(stage, None)
        self._keys[stage] = artifact.key
        self._write("stage_cached", stage, artifact=as_document(artifact), points=list(points))

    def end_stage(self, stage: str, *, status: Status, artifact: Artifact | None = None, error: str = "") -> None:
        """End a stage's child run, if it was begun; a model artifact is registered as candidate."""
        if stage not in self._keys:
            return
        self._open.pop(stage, None)
        document = as_document(artifact) if artifact is not None else None
        self._write("end_stage", stage, status=status, artifact=document, error=error)

    def log_metrics(self, stage: str, step: int, values: Mapping[str, float], *, time_ms: int | None = None) -> None:
        """Points of a stage's curves; with stage "" of the workflow run. A step that was logged before is dropped."""
        time_ms = _now() if time_ms is None else time_ms
        points = [[name, step, float(value), time_ms] for name, value in values.items()]
        self._write("metrics", stage, points=points)

    def log_image(self, stage: str, step: int, name: str, png: bytes) -> None:
        """An image that MLflow's page shows by step."""
        self._write("image", stage, step=step, name=name, blob=self._journal.write_blob(png, suffix=".png"))

    def log_text(self, stage: str, name: str, content: str) -> None:
        """A text file `name`, such as the report; it replaces what had that name."""
        blob = self._journal.write_blob(content.encode(), suffix=".txt")
        self._write("text", stage, name=name, blob=blob)

    def end_run(self, status: Status, *, timeout_seconds: float = 120.0) -> list[str]:
        """End the workflow run and close. If it is FINISHED, each model of it becomes champion of its name.

        Returns warnings for the user: what could not be sent yet.
        """
        for stage in list(self._open):
            self.end_stage(stage, status="KILLED")
        self._write("end_run", status=status)
        return self.close(timeout_seconds=timeout_seconds)

    def close(self, *, timeout_seconds: float = 120.0) -> list[str]:
        """Send what is left, waiting at most this long, and not at all for an MLflow that is away. Returns warnings."""
        with self._lock:
            self._closed = True
        problem = self._sender.finish(timeout_seconds)
        warnings = [] if self._sender.delivery is None else list(self._sender.delivery.warnings)
        if problem is None:
            return warnings
        return [
            *warnings,
            f"MLflow did not take everything ({problem}); the rest waits in {self._journal.folder.parent} "
            "and is sent by the next run",
        ]

    def _write(self, event: str, stage: str = "", **values: Any) -> None:
        key = self._keys.get(stage, "")
        about = {"event": event, "time": _now(), "run": self._run, "models": self._models, "stage": stage, "key": key}
        with self._lock:
            if not self._closed:  # a worker's last word may come after the end
                self._journal.append(about | values)

    def _sample_system(self) -> None:
        """The machine's load belongs to the workflow run and to every stage that runs now."""
        if not self._run:
            return
        values = self._system.sample()
        for stage in ("", *list(self._open)):
            self.log_metrics(stage, 0, values)


class Sender(threading.Thread):
    """Sends journals, oldest first, each in its own order."""

    def __init__(self, journals: list[Journal], *, flush_seconds: float, before: Any) -> None:
        super().__init__(name="mlflow-sender", daemon=True)  # a hanging MLflow never keeps a process alive
        self.journals = journals
        self.flush_seconds = flush_seconds
        self.before = before
        self.delivery: Delivery | None = None
        self.away: str | None = None  # why, in one line
        self.ending = threading.Event()

    def run(self) -> None:
        for journal in self.journals[:-1]:
            end_killed(journal)
        seconds = min(1.0, self.flush_seconds)  # the run is to be seen soon
        while not self.ending.wait(seconds):
            self.before()
            self.send()
            seconds = self.flush_seconds
        self.send()
        for journal in self.journals:  # what has not arrived stays on disk
            journal.close()

    def finish(self, timeout_seconds: float) -> str | None:
        """Send the rest. Returns None if everything has arrived, else why not, in one line."""
        self.ending.set()
        self.join(timeout_seconds)
        if self.is_alive():
            return self.away or f"it is slower than {timeout_seconds:g} s"
        return self.away

    def send(self) -> None:
        """Send everything there is, until MLflow is found to be away; say once when it goes and when it is back."""
        try:
            while self.journals:
                if not self.send_some(self.journals[0]):
                    if len(self.journals) == 1 and not self.ending.is_set():
                        break  # the own journal stays open until the end
                    self.journals.pop(0).close()
        except MlflowAwayError as error:
            if self.away is None:
                logger.warning("MLflow is away, the run goes on and its points are kept: %s", error)
            self.away = str(error)
            return
        if self.away is not None:
            logger.warning("MLflow is back, what was kept has been sent")
        self.away = None

    def send_some(self, journal: Journal) -> bool:
        """Send the next events of a journal. Returns False if there were none. Raises MlflowAwayError."""
        events, position = journal.unshipped(limit=EVENTS_AT_ONCE)
        if not events:
            return False
        for event in coalesce(events):
            self.send_one(event, journal)
        journal.mark(position)
        return True

    def send_one(self, event: Event, journal: Journal) -> None:
        """Deliver one event. What MLflow refuses for good is set aside; raises MlflowAwayError for everything else."""
        try:
            if self.delivery is None:
                self.delivery = Delivery(**journal.destination)
        except Exception as error:  # a database or a network may raise anything
            raise MlflowAwayError(_one_line(error)) from error
        try:
            self.delivery.deliver(event, journal)
        except Exception as error:
            if not _is_refusal(error):
                raise MlflowAwayError(_one_line(error)) from error
            logger.warning("MLflow can't take %s of %s", event["event"], event["stage"] or "the run", exc_info=error)
            journal.set_aside(event, _one_line(error))


def _is_refusal(error: Exception) -> bool:
    """Whether trying again can't help; an outage of network, storage or database may raise anything else."""
    if isinstance(error, MlflowException):
        return error.error_code in REFUSALS
    if isinstance(error, OSError):
        return isinstance(error, FileNotFoundError | UnidentifiedImageError)
    return isinstance(error, ArtifactError | ArithmeticError | AttributeError | LookupError | TypeError | ValueError)


def end_killed(journal: Journal) -> None:
    """Close what a killed process left open in its journal: its runs are KILLED, from its last sign of life on."""
    open_: dict[str, Event] = {}
    last = 0
    for event in journal.events():
        last = event["time"]
        if event["event"] in ("start_run", "start_stage"):
            open_[event["key"]] = event
        elif event["event"] in ("end_run", "end_stage", "stage_cached"):
            open_.pop(event["key"], None)
    for event in reversed(open_.values()):  # the parent, begun first, ends last
        name = "end_stage" if event["key"] else "end_run"
        about = {name: event[name] for name in ("run", "models", "recipe", "stage", "key") if name in event}
        journal.append(about | {"event": name, "time": last, "status": "KILLED", "artifact": None, "error": ""})


def _now() -> int:
    return time.time_ns() // 1_000_000


def _one_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
