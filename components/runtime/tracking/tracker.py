"""The one door through which a workflow run tells MLflow what it does, in one process.

`emit` writes a line to a journal on disk and returns; a thread sends the journal, about every ten seconds, as few
calls as MLflow allows. MLflow being away stops nothing and loses nothing: the journal waits, and what is left when the
run ends is sent by the next tracker that opens the same spool folder for the same MLflow.
"""

import logging
import threading
from pathlib import Path
from typing import Any

from mlflow.exceptions import MlflowException
from mlflow.system_metrics.metrics.base_metrics_monitor import BaseMetricsMonitor
from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor
from PIL import UnidentifiedImageError

from components.runtime import events
from components.runtime.storage.artifact import ArtifactError
from components.runtime.tracking.delivery import Delivery
from components.runtime.tracking.journal import Journal, Line, left_journals, new_journal
from components.runtime.tracking.lines import coalesce, line_of
from components.runtime.tracking.names import SYSTEM
from components.runtime.tracking.promotion import Promotion

logger = logging.getLogger(__name__)
LINES_AT_ONCE = 5000
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
        self._run = {"run": "", "models": ""}  # its name, and that of its models
        self._keys: dict[str, str] = {}  # every stage ever named -> key
        self._running: set[str] = set()  # stages
        self._sender = Sender([*left, self._journal], flush_seconds=flush_seconds, before=self._sample_system)
        self._system = SystemMonitor()
        self._sender.start()

    def emit(self, event: events.Event) -> None:
        """Write what MLflow shows of an event to the journal; the end of a stage that never began is dropped.

        Raises ValueError for a run's name with quotes in it.
        """
        with self._lock:
            if self._closed or not self._follow(event):  # a worker's last word may come after the end
                return
            time_ms = events.now_ms()
            line = line_of(event, time_ms=time_ms, write_blob=self._journal.write_blob)
            if line is not None:
                stage = getattr(event, "stage", "")
                origin = {"time": time_ms, **self._run, "stage": stage, "key": self._keys.get(stage, "")}
                self._journal.append(line | origin)

    def _follow(self, event: events.Event) -> bool:
        """Know the run, its stages and which of them run now. Returns whether the event belongs to it."""
        match event:
            case events.RunStarted(run, _, _, tags):
                if "'" in run or "`" in run:
                    raise ValueError(f"a run's name can't hold quotes: {run}")
                self._run = {"run": run, "models": tags["name"]}
            case events.StageStarted(stage, key):
                self._keys[stage] = key
                self._running.add(stage)
            case events.StageCached(stage, artifact):
                self._keys[stage] = artifact.key
                self._running.discard(stage)
            case events.StageEnded(stage):
                self._running.discard(stage)
                return stage in self._keys
        return True

    @property
    def promotion(self) -> list[Promotion] | None:
        """Decisions about the models of a run that ended well; None while MLflow has not heard of it."""
        return None if self._sender.delivery is None else self._sender.delivery.promotions.get(self._run["run"])

    def close(
        self, status: events.Status, *, promote: events.Promote = "better", timeout_seconds: float = 120.0
    ) -> list[str]:
        """End the run and whatever of it still runs, and send what is left.

        Waits at most `timeout_seconds`, and not at all for an MLflow that is away. Returns warnings for the user.
        """
        for stage in sorted(self._running):
            self.emit(events.StageEnded(stage, "KILLED"))
        self.emit(events.RunEnded(status, promote))
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

    def _sample_system(self) -> None:
        """The machine's load belongs to the workflow run and to every stage that runs now."""
        if not self._run["run"]:
            return
        values = self._system.sample()
        for stage in ("", *sorted(self._running)):
            self.emit(events.Metrics(stage, 0, values))


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
        """Send the next lines of a journal. Returns False if there were none. Raises MlflowAwayError."""
        lines, position = journal.unshipped(limit=LINES_AT_ONCE)
        if not lines:
            return False
        for line in coalesce(lines):
            self.send_one(line, journal)
        journal.mark(position)
        return True

    def send_one(self, line: Line, journal: Journal) -> None:
        """Deliver one line. What MLflow refuses for good is set aside; raises MlflowAwayError for everything else."""
        try:
            if self.delivery is None:
                self.delivery = Delivery(**journal.destination)
        except Exception as error:  # a database or a network may raise anything
            raise MlflowAwayError(_one_line(error)) from error
        try:
            self.delivery.deliver(line, journal)
        except Exception as error:
            if not _is_refusal(error):
                raise MlflowAwayError(_one_line(error)) from error
            logger.warning("MLflow can't take %s of %s", line["event"], line["stage"] or "the run", exc_info=error)
            journal.set_aside(line, _one_line(error))


def _is_refusal(error: Exception) -> bool:
    """Whether trying again can't help; an outage of network, storage or database may raise anything else."""
    if isinstance(error, MlflowException):
        return error.error_code in REFUSALS
    if isinstance(error, OSError):
        return isinstance(error, FileNotFoundError | UnidentifiedImageError)
    return isinstance(error, ArtifactError | ArithmeticError | AttributeError | LookupError | TypeError | ValueError)


def end_killed(journal: Journal) -> None:
    """Close what a killed process left open in its journal: its runs are KILLED, from its last sign of life on."""
    open_: dict[str, Line] = {}
    last = 0
    for line in journal.lines():
        last = line["time"]
        if line["event"] in ("start_run", "start_stage"):
            open_[line["key"]] = line
        elif line["event"] in ("end_run", "end_stage", "stage_cached"):
            open_.pop(line["key"], None)
    for line in reversed(open_.values()):  # the parent, begun first, ends last
        name = "end_stage" if line["key"] else "end_run"
        origin = {name: line[name] for name in ("run", "models", "recipe", "stage", "key") if name in line}
        journal.append(origin | {"event": name, "time": last, "status": "KILLED", "artifact": None, "error": ""})


def _one_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


class SystemMonitor:
    """CPU, memory, disk, network, and GPUs where there are any and their library is installed."""

    def __init__(self) -> None:
        self.monitors: list[BaseMetricsMonitor] = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
        try:
            self.monitors.append(GPUMonitor())
        except (ImportError, MlflowException, RuntimeError):  # no NVML here, so nothing to measure
            return

    def sample(self) -> dict[str, float]:
        """Values now, such as system/cpu_utilization_percentage (since the last call) in percent."""
        values: dict[str, float] = {}
        for monitor in self.monitors:
            monitor.collect_metrics()
            values |= {SYSTEM + name: float(value) for name, value in monitor.aggregate_metrics().items()}
            monitor.clear_metrics()
        return values
