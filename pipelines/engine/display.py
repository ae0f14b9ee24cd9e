"""The live table on a terminal, plain log lines elsewhere."""

import logging
import time
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from components.evaluation.measures import MEASURES
from pipelines.engine.recorder import StageStatus
from pipelines.planning.shares import table_of
from pipelines.workflow import PlannedStage

logger = logging.getLogger("cascade")
LINE_SECONDS = 15.0
BAR = 10  # columns
IN_A_LINE = ("samples_per_second", "mfu", "achieved_gflops", "data_wait_fraction")
COLORS = dict(done="green", cached="cyan", failed="red", running="yellow", skipped="dim", queued="magenta")


class Display:
    """Shows running stages: `with Display(console) as show: show(statuses)`."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.live = Live(console=self.console, refresh_per_second=4) if self.console.is_terminal else None
        self.states: dict[str, str] = {}
        self.warned: dict[str, int] = {}  # warnings that were shown
        self.last = 0.0

    def __enter__(self) -> "Display":
        if self.live is not None:
            self.live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.live is not None:
            self.live.stop()

    def __call__(self, statuses: list[StageStatus]) -> None:
        """Show new warnings at once (a killed driver prints none at its end) and the table.
        Without a terminal, a line at each change of a stage's state, and now and then for each running stage."""
        due = time.monotonic() - self.last > LINE_SECONDS
        for status in statuses:
            for line in status.warnings[self.warned.get(status.name, 0) :]:
                if self.live is not None:
                    say(self.console, f"{status.name}: {line}", "yellow")
                else:
                    logger.warning("%s: %s", status.name, line)
            self.warned[status.name] = len(status.warnings)
            changed = self.states.get(status.name) != status.state
            if self.live is None and (changed or (due and status.state in ("running", "queued"))):
                logger.info("%s", status_line(status))
            self.states[status.name] = status.state
        if self.live is not None:
            self.live.update(run_tables(statuses))
        elif due:
            self.last = time.monotonic()


def say(console: Console, line: str, style: str = "") -> None:
    """Print a line as it is, however long; square brackets and numbers in it have no meaning."""
    console.print(line, style=style, markup=False, highlight=False, soft_wrap=True)


def run_tables(statuses: list[StageStatus]) -> Group:
    """The stages' progress and, below, the trainings' use of the machine; 100 columns hold both."""
    measured = [status for status in statuses if status.measures]
    shown = {name: measure for name, measure in MEASURES.items() if any(name in s.measures for s in measured)}
    table = table_of("training", [measure.title for measure in shown.values()])
    for status in measured:
        texts = (m.text(status.measures[name]) if name in status.measures else "" for name, m in shown.items())
        table.add_row(status.name, *texts)
    return Group(stage_table(statuses), *(["", table] if measured else []))


def stage_table(statuses: list[StageStatus]) -> Table:
    """A table of stages: state, bar, step, speed, time to go, last loss."""
    table = table_of("stage", ())
    for title in ("state", ""):
        table.add_column(title, no_wrap=True)
    for title in ("step", "speed", "ETA", "time", "loss"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("")
    for status in statuses:
        bar = ProgressBar(total=status.total, completed=status.step, width=BAR) if status.total else ""
        table.add_row(
            status.name,
            Text(status.state, style=COLORS.get(status.state, "")),
            bar,
            f"{status.step}/{status.total}" if status.total else "",
            _speed(status),
            duration(status.eta) if status.state == "running" else "",
            duration(status.seconds),
            f"{status.loss:.4f}" if status.loss is not None else "",
            Text(status.note, style="dim"),
        )
    return table


def status_line(status: StageStatus) -> str:
    """A log line of a stage."""
    parts = [f"{status.name}: {status.state}"]
    if status.state == "running" and status.total:
        parts.append(f"{status.unit} {status.step}/{status.total}")
        parts += [_speed(status), f"ETA {duration(status.eta)}" if status.eta else ""]
        parts.append(f"loss {status.loss:.4f}" if status.loss is not None else "")
        measures = [(MEASURES[name], status.measures[name]) for name in IN_A_LINE if name in status.measures]
        parts += [f"{measure.title} {measure.text(value)}" for measure, value in measures]
    if status.state in ("done", "failed") and status.seconds is not None:
        parts.append(f"after {duration(status.seconds)}")
    parts.append(status.note)
    return ", ".join(part for part in parts if part)


def duration(seconds: float | None) -> str:
    """Minutes and seconds, hours where needed; empty for None."""
    if seconds is None:
        return ""
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _speed(status: StageStatus) -> str:
    if not status.rate or status.state != "running":
        return ""
    return f"{status.rate:.1f} {status.unit}s/s" if status.rate >= 1 else f"{1 / status.rate:.1f} s/{status.unit}"


def plan_table(planned: list[PlannedStage]) -> Table:
    """A table of the plan: key, cached or to run, and inputs of each stage."""
    table = table_of("stage", ())
    for title in ("key", "state", "needs"):
        table.add_column(title)
    for entry in planned:
        state = "run" if entry.wanted else "cached" if entry.cached else "not selected"
        needs = ", ".join(parent.name for parent in entry.stage.parents.values())
        table.add_row(entry.stage.name, entry.key, Text(state, style=COLORS.get(state, "")), needs)
    return table
