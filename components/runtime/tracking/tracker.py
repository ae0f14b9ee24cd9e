"""Sends the log of a workflow run to MLflow, from a single process.

`emit` writes a line to the log on disk and returns; a thread sends what is new, about every ten seconds. MLflow being
away stops nothing and loses nothing: what is left is copied to the run's folder in storage for `cascade register`, and
is sent by the next tracker of the same spool folder and MLflow.
"""

import logging
import re
import threading
import time
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from mlflow.exceptions import MlflowException
from mlflow.system_metrics.metrics.base_metrics_monitor import BaseMetricsMonitor
from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor
from PIL import UnidentifiedImageError
from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_random

from components.runtime import events
from components.runtime.events import LogEntry
from components.runtime.storage.artifact import ArtifactError
from components.runtime.storage.store import Store, StoreError
from components.runtime.tracking.delivery import Delivery, batches
from components.runtime.tracking.event_log import EventLog, Journal, left_journals, open_journal, restored_journal
from components.runtime.tracking.names import SYSTEM
from components.runtime.tracking.registry import name_of

logger = logging.getLogger(__name__)
RECORDS_AT_ONCE = 5000
KEEP_SECONDS = 60.0  # between two copies of the journal to storage while MLflow is away
DECISIVE = (events.RunStarted, events.StageStarted, events.StageCached, events.StageEnded, events.RunEnded)
REFUSALS = ("BAD_REQUEST", "INVALID_PARAMETER_VALUE", "RESOURCE_ALREADY_EXISTS", "RESOURCE_DOES_NOT_EXIST")
CONFLICT = re.compile("unique|duplicate", re.IGNORECASE)  # SQLite, PostgreSQL and MySQL of a row that is there already
CONFLICT_TRIES = 5


class MlflowAwayError(Exception):
    """MLflow, MLflow's storage or MLflow's database is away; the journal waits."""


class Tracker:
    """Parent and child runs, curves, images, lineage, models and machine load of a workflow run.
    A thread sends the journals of the local folder `spool`, oldest first; the last is this process's own, `journal` by
    name if a process before this one began it, or restored from `copy`. Raises OSError where the disk has no room."""

    def __init__(
        self,
        tracking_uri: str,
        *,
        experiment: str,
        spool: Path,
        flush_seconds: float = 10.0,
        journal: str = "",
        copy: Store | None = None,
    ) -> None:
        destination = {"tracking_uri": tracking_uri, "experiment": experiment}
        self._spool, self._flush_seconds = spool, flush_seconds
        restored = None if copy is None else restored_journal(copy, spool, destination=destination)
        own = restored or open_journal(spool, destination=destination, name=journal)
        self._journals, self._own = [*left_journals(spool, destination=destination), own], own
        self._copied = float("-inf")
        self.log = EventLog(own)
        if restored is not None:
            list(self.log.resume())
            restored.place = copy  # wherever its driver saw it
        self.emit = self.log.append
        self.delivery: Delivery | None = None
        self._away: str | None = None  # why MLflow is, in one line
        self.undelivered = ""  # after the end: why MLflow lacks a part of the run that decides on its models
        self.unregistered: list[str] = []  # names of models in that part
        self._ending = threading.Event()
        self._monitors: list[BaseMetricsMonitor] = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
        with suppress(ImportError, MlflowException, RuntimeError):  # no NVML here, so nothing to measure
            self._monitors.append(GPUMonitor())
        self._thread = threading.Thread(target=self._run, name="mlflow-sender", daemon=True)
        self._thread.start()  # a daemon: a hanging MLflow never keeps a process alive

    def close(
        self, status: events.Status, *, promote: events.Promote = "better", timeout_seconds: float = 120.0
    ) -> list[str]:
        """End the run and running stages, and send the rest. Returns warnings for the user.
        Waits at most `timeout_seconds`, and not at all for an MLflow that is away."""
        self.log.end(status, promote)
        self._ending.set()
        self._thread.join(timeout_seconds)
        problem = self._away
        if self._thread.is_alive():
            problem = problem or f"it is slower than {timeout_seconds:g} s"
        warnings = [] if self.delivery is None else list(self.delivery.warnings)
        refused = self._own.refused()
        counts = Counter((type(each.event).__name__, each.stage or "the run", why) for why, each in refused)
        warnings += [f"MLflow refused {kind} of {of}, {times} x: {why}" for (kind, of, why), times in counts.items()]
        decisive = [why for why, record in refused if isinstance(record.event, DECISIVE)]
        self.undelivered = problem or (decisive or [""])[0]
        if self.undelivered:
            self.unregistered = unregistered(self._own.left())
            rest = f"the rest waits in {self._keep() or self._spool}, and is sent by the next run here"
            warnings.append(f"MLflow did not take everything ({self.undelivered}); {rest}")
        return warnings

    def _keep(self) -> str:
        """Copy to storage what MLflow lacks; returns the URL of the copy, "" where there is none."""
        try:
            self._own.keep()
        except (OSError, StoreError) as error:
            logger.warning("what MLflow lacks is not copied to storage: %s", error)
            return ""
        return "" if self._own.place is None else self._own.place.uri

    def _run(self) -> None:
        for journal in self._journals[:-1]:
            EventLog(journal).end_killed()
        seconds = min(1.0, self._flush_seconds)  # the run is to be seen soon
        while not self._ending.wait(seconds):
            if self.log.run:
                values: dict[str, float] = {}  # in percent, since the look before
                for monitor in self._monitors:
                    monitor.collect_metrics()
                    values |= {SYSTEM + name: float(value) for name, value in monitor.aggregate_metrics().items()}
                    monitor.clear_metrics()
                for stage in ("", *sorted(self.log.running)):
                    self.emit(events.Metrics(stage, 0, values))
            self._send()
            seconds = self._flush_seconds
        self._send()
        for journal in self._journals:  # what has not arrived stays on disk
            journal.close()

    def _send(self) -> None:
        """Send everything until MLflow is away; warn once when MLflow goes and once on MLflow's return."""
        try:
            while self._journals:
                journal = self._journals[0]
                records, position = journal.unshipped(limit=RECORDS_AT_ONCE)
                for batch in batches(records):
                    self._send_batch(batch, journal)
                if records:
                    journal.mark(position)
                elif len(self._journals) == 1 and not self._ending.is_set():
                    break  # the own journal stays open until the end
                else:
                    self._journals.pop(0).close()
        except MlflowAwayError as error:
            if self._away is None:
                logger.warning("MLflow is away, the run goes on and its points are kept: %s", error)
            self._away = str(error)
            if time.monotonic() - self._copied > KEEP_SECONDS and not self._ending.is_set():
                self._copied = time.monotonic()
                self._keep()
            return
        if self._away is not None:
            logger.warning("MLflow is back, what was kept has been sent")
        self._away = None

    def _send_batch(self, batch: list[LogEntry], journal: Journal) -> None:
        """Deliver records together; set aside those refused for good. Raises MlflowAwayError for other errors."""
        try:
            if self.delivery is None:
                self.delivery = Delivery(**journal.destination)
            tries = {"stop": stop_after_attempt(CONFLICT_TRIES), "wait": wait_random(0.1, 1)}
            Retrying(retry=retry_if_exception(_is_conflict), reraise=True, **tries)(self.delivery.deliver, batch)
        except Exception as error:  # a database or a network may raise anything
            reason = (str(error).splitlines() or [type(error).__name__])[0][:300]
            if self.delivery is None or not _is_refusal(error):
                raise MlflowAwayError(reason) from error
            what, stage = type(batch[0].event).__name__, batch[0].stage or "the run"
            logger.warning("MLflow can't take %s of %s", what, stage, exc_info=error)
            for record in batch:
                journal.set_aside(record.line(), reason)


def unregistered(records: Iterable[LogEntry]) -> list[str]:
    """Registered names of the models that these records hold, sorted."""
    artifacts = [(record.models, getattr(record.event, "artifact", None)) for record in records]
    return sorted({name_of(models, own) for models, own in artifacts if own is not None and own.kind == "model"})


def _is_conflict(error: BaseException) -> bool:
    """True where another driver wrote the same row in the same moment: delivered again, it is found there."""
    return isinstance(error, MlflowException) and CONFLICT.search(str(error)) is not None


def _is_refusal(error: Exception) -> bool:
    """True for permanent errors; outages of network, storage or database raise other errors."""
    if isinstance(error, MlflowException):
        return error.error_code in REFUSALS
    if isinstance(error, OSError):
        return isinstance(error, FileNotFoundError | UnidentifiedImageError)
    return isinstance(error, ArtifactError | ArithmeticError | AttributeError | LookupError | TypeError | ValueError)
