"""Events of a run, and their form as lines of a log.

Workers, stages and the workflow emit them; the live table, the report and MLflow read them in the log.
"""

import base64
import json
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, get_args

from components.runtime.storage.artifact import Artifact

Status = Literal["FINISHED", "FAILED", "KILLED"]
Promote = Literal["better", "always", "never"]  # whether the models of a run become champions


class Progress(NamedTuple):
    """The position of a stage; only the latest counts. A rate or a loss of None stays as before."""

    stage: str
    step: int
    total: int
    unit: str = "step"
    rate: float | None = None  # units/s
    loss: float | None = None


class Metrics(NamedTuple):
    """A point of each of a stage's curves; with stage "" of the run's curves."""

    stage: str
    step: int
    values: Mapping[str, float]


class Image(NamedTuple):
    """An image on MLflow's page, by step."""

    stage: str
    step: int
    name: str
    png: bytes


class Text(NamedTuple):
    """A text file of a stage, or with stage "" of the run; replaces a file of the same name."""

    stage: str
    name: str
    content: str


class Warning(NamedTuple):
    """A line for the user though the run goes on: shown at once, printed at the end, kept as a text."""

    stage: str
    line: str


class RunStarted(NamedTuple):
    """The workflow run begins, or is taken up again."""

    run: str
    recipe_yaml: str
    parameters: Mapping[str, Any]
    tags: Mapping[str, str]  # `name` of its models, `git_commit`, and what else is known


class ModelsDescribed(NamedTuple):
    """Descriptions of the run's models for the registry, as Markdown."""

    about: str  # of all their versions
    details: str  # of those of this run


class RunEnded(NamedTuple):
    """The end of the run; after FINISHED the run's models may become champions of their names."""

    status: Status
    promote: Promote = "better"


class StageHeld(NamedTuple):
    """A stage that waits, for its turn or for another driver, or is left out; `note` is the reason."""

    stage: str
    state: Literal["waiting", "queued", "skipped"]
    note: str = ""


class StageStarted(NamedTuple):
    """The start of a stage; a retry with the same key goes on in the same child run."""

    stage: str
    key: str
    config: Mapping[str, Any]
    inputs: Mapping[str, Artifact]
    root: str = ""  # URI of the stage's folder, where its log is kept; empty: nowhere


class StageCached(NamedTuple):
    """A stage with a cached artifact, which does not run."""

    stage: str
    artifact: Artifact


class StageEnded(NamedTuple):
    """The end of a started stage; a model among the artifacts is registered as candidate."""

    stage: str
    status: Status
    artifact: Artifact | None = None
    error: str = ""  # one line


RunEvent = RunStarted | ModelsDescribed | RunEnded
StageEvent = StageHeld | StageStarted | StageCached | StageEnded
Event = Progress | Metrics | Image | Text | Warning | RunEvent | StageEvent
KINDS: dict[str, type] = {kind.__name__: kind for kind in get_args(Event)}


class LogEntry(NamedTuple):
    """An event in the log, with time, run and stage key."""

    time: int  # milliseconds since 1970
    run: str
    models: str  # name of the run's models
    key: str  # of the event's stage; empty for an event of the run itself
    event: Event

    @property
    def stage(self) -> str:
        """Name of the event's stage; empty for an event of the run."""
        return getattr(self.event, "stage", "")

    def line(self) -> bytes:
        """Serializes the record as a line of JSON."""
        document = self._asdict() | {"event": type(self.event).__name__, "fields": self.event._asdict()}
        return json.dumps(document, default=_encoded).encode() + b"\n"

    @classmethod
    def read(cls, line: bytes) -> "LogEntry":
        """The inverse of `line`. Raises JSONDecodeError for a line that was cut.
        Raises LookupError for an unknown event, TypeError or ValueError for one with other fields."""
        document = json.loads(line, object_hook=_decoded)
        kind, fields = KINDS[document.pop("event")], document.pop("fields")
        return cls(**document, event=kind(**fields))


class Recorder:
    """A receiver of events, callable from any worker, that never raises. This one drops all events."""

    def emit(self, event: Event) -> None: ...

    def settle(self) -> None: ...


def _encoded(value: Any) -> Any:
    """Values that JSON lacks: artifacts with addresses, bytes, and numpy's numbers."""
    if isinstance(value, Artifact):
        return {"$artifact": value.model_dump(mode="json") | {"root": value.root}}
    if isinstance(value, bytes):
        return {"$bytes": base64.b64encode(value).decode()}
    return float(value)


def _decoded(document: dict[str, Any]) -> Any:
    if "$artifact" in document:
        return Artifact(**document["$artifact"])
    return base64.b64decode(document["$bytes"]) if "$bytes" in document else document
