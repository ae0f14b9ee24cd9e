"""Sends the log of a workflow run to MLflow, from a single process.

`emit` writes a line to the log on disk and returns; a thread sends what is new, about every ten seconds, in as few
calls as MLflow allows. MLflow being away stops nothing and loses nothing: the journal waits, and what is left when the
run ends is sent by the next tracker that opens the same spool folder for the same MLflow.
"""

import logging
import threading
from collections.abc import Callable
from pathlib import Path

from mlflow.exceptions import MlflowException
from mlflow.system_metrics.metrics.base_metrics_monitor import BaseMetricsMonitor
from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor
from PIL import UnidentifiedImageError

from components.runtime import events
from components.runtime.storage.artifact import ArtifactError
from components.runtime.tracking.delivery import Delivery, batches
from components.runtime.tracking.event_log import EventLog
from components.runtime.tracking.journal import Journal, left_journals, new_journal
from components.runtime.tracking.names import SYSTEM
from components.runtime.tracking.promotion import Promotion

logger = logging.getLogger(__name__)
RECORDS_AT_ONCE = 5000
REFUSALS = ("BAD_REQUEST", "INVALID_PARAMETER_VALUE", "RESOURCE_ALREADY_EXISTS", "RESOURCE_DOES_NOT_EXIST")


class MlflowAwayError(Exception):
    """MLflow, MLflow's storage or MLflow's database is away; the journal waits."""


class Tracker:
    """Parent and child runs, curves, images, lineage, models and machine load of a workflow run.

    Args:
        tracking_uri: of an MLflow server, or `sqlite:///…`.
        experiment: created if missing.
        spool: local folder of the journals; give the same one next time.
        flush_seconds: about how often points are sent.
    """

    def __init__(self, tracking_uri: str, *, experiment: str, spool: Path, flush_seconds: float = 10.0) -> None:
        destination = {"tracking_uri": tracking_uri, "experiment": experiment}
        self._spool = spool
        left = left_journals(spool, destination=destination)
        self.log = EventLog(new_journal(spool, destination=destination))
        self.emit = self.log.append
        self._sender = Sender([*map(EventLog, left), self.log], flush_seconds=flush_seconds, before=self._sample_system)
        self._system = SystemMonitor()
        self._sender.start()

    @property
    def promotion(self) -> list[Promotion] | None:
        """Decisions about the models of a finished run; None until MLflow has received the run's end."""
        return None if self._sender.delivery is None else self._sender.delivery.promotions.get(self.log.run)

    @property
    def pages(self) -> dict[str, str]:
        """Addresses of MLflow's pages of the run, as far as MLflow has received the run."""
        return {} if self._sender.delivery is None else self._sender.delivery.pages(self.log.run)

    def close(
        self, status: events.Status, *, promote: events.Promote = "better", timeout_seconds: float = 120.0
    ) -> list[str]:
        """End the run and running stages, and send the rest.

        Waits at most `timeout_seconds`, and not at all for an MLflow that is away. Returns warnings for the user.
        """
        self.log.end(status, promote)
        problem = self._sender.finish(timeout_seconds)
        warnings = [] if self._sender.delivery is None else list(self._sender.delivery.warnings)
        if problem is None:
            return warnings
        return [
            *warnings,
            f"MLflow did not take everything ({problem}); the rest waits in {self._spool} and is sent by the next run",
        ]

    def _sample_system(self) -> None:
        """Log the machine's load for the workflow run and for every running stage."""
        if self.log.run:
            values = self._system.sample()
            for stage in ("", *sorted(self.log.running)):
                self.emit(events.Metrics(stage, 0, values))


class Sender(threading.Thread):
    """Sends the journals of logs, oldest first, each in order; the last is this process's own."""

    def __init__(self, logs: list[EventLog], *, flush_seconds: float, before: Callable[[], None]) -> None:
        super().__init__(name="mlflow-sender", daemon=True)  # a hanging MLflow never keeps a process alive
        self.left = logs[:-1]
        self.journals = [log.journal for log in logs if log.journal is not None]
        self.flush_seconds = flush_seconds
        self.before = before
        self.delivery: Delivery | None = None
        self.away: str | None = None  # why, in one line
        self.ending = threading.Event()

    def run(self) -> None:
        for log in self.left:
            log.end_killed()
        seconds = min(1.0, self.flush_seconds)  # the run is to be seen soon
        while not self.ending.wait(seconds):
            self.before()
            self.send()
            seconds = self.flush_seconds
        self.send()
        for journal in self.journals:  # what has not arrived stays on disk
            journal.close()

    def finish(self, timeout_seconds: float) -> str | None:
        """Send the rest. Returns None on full arrival, else the reason, in one line."""
        self.ending.set()
        self.join(timeout_seconds)
        if self.is_alive():
            return self.away or f"it is slower than {timeout_seconds:g} s"
        return self.away

    def send(self) -> None:
        """Send everything until MLflow is away; warn once when MLflow goes and once on MLflow's return."""
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
        """Send the next records of a journal. Returns False if there were none. Raises MlflowAwayError."""
        records, position = journal.unshipped(limit=RECORDS_AT_ONCE)
        if not records:
            return False
        for batch in batches(records):
            self.send_batch(batch, journal)
        journal.mark(position)
        return True

    def send_batch(self, batch: list[events.LogEntry], journal: Journal) -> None:
        """Deliver records together; set aside records that MLflow refuses for good.

        Raises MlflowAwayError for other errors.
        """
        try:
            if self.delivery is None:
                self.delivery = Delivery(**journal.destination)
        except Exception as error:  # a database or a network may raise anything
            raise MlflowAwayError(_one_line(error)) from error
        try:
            self.delivery.deliver(batch)
        except Exception as error:
            if not _is_refusal(error):
                raise MlflowAwayError(_one_line(error)) from error
            what, stage = type(batch[0].event).__name__, batch[0].stage or "the run"
            logger.warning("MLflow can't take %s of %s", what, stage, exc_info=error)
            for record in batch:
                journal.set_aside(record.line(), _one_line(error))


def _is_refusal(error: Exception) -> bool:
    """True for permanent errors; outages of network, storage or database raise other errors."""
    if isinstance(error, MlflowException):
        return error.error_code in REFUSALS
    if isinstance(error, OSError):
        return isinstance(error, FileNotFoundError | UnidentifiedImageError)
    return isinstance(error, ArtifactError | ArithmeticError | AttributeError | LookupError | TypeError | ValueError)


def _one_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


class SystemMonitor:
    """CPU, memory, disk, network, and GPUs where GPUs and their library are installed."""

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
