"""What happens in a run, as small records that go one way: `recorder.emit(event)`.

Workers and stages say how they get on, the workflow says what becomes of each stage. The live table shows the last of
it, MLflow all of it.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

from components.runtime.storage.artifact import Artifact

Point = tuple[str, int, float, int]  # name, step, value, milliseconds since 1970
Status = Literal["FINISHED", "FAILED", "KILLED"]
Promote = Literal["better", "always", "never"]  # whether the models of a run become champions


class Progress(NamedTuple):
    """How far a stage is; a rate or a loss that is not given stays as it was."""

    stage: str
    step: int
    total: int
    unit: str = "step"
    rate: float | None = None  # units/s
    loss: float | None = None


class Metrics(NamedTuple):
    """One point of each of a stage's curves; with stage "" of the run's."""

    stage: str
    step: int
    values: Mapping[str, float]
    time_ms: int | None = None  # milliseconds since 1970; None: when it arrives


class Image(NamedTuple):
    """An image that MLflow's page shows by step."""

    stage: str
    step: int
    name: str
    png: bytes


class Text(NamedTuple):
    """A text file of a stage, or with stage "" of the run; it replaces what had that name."""

    stage: str
    name: str
    content: str


class Warning(NamedTuple):
    """What the user is to know though the run goes on: shown when it comes, printed at the end, kept as a text."""

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
    """If it is FINISHED, the models of the run may become champions of their names."""

    status: Status
    promote: Promote = "better"


class StagePlanned(NamedTuple):
    """A stage that the run has, whatever becomes of it."""

    stage: str
    key: str


class StageHeld(NamedTuple):
    """A stage that does not work, not yet or not at all, for what `note` says."""

    stage: str
    state: Literal["queued", "skipped"]
    note: str


class StageStarted(NamedTuple):
    """A stage works; a retry with the same key goes on in the child run that is there."""

    stage: str
    key: str
    config: Mapping[str, Any]
    inputs: Mapping[str, Artifact]
    points: Sequence[Point] = ()  # of earlier tries; what MLflow has not got, because a journal was lost, is sent again


class StageCached(NamedTuple):
    """A stage that need not run, with what was made before; `points` as StageStarted has them."""

    stage: str
    artifact: Artifact
    points: Sequence[Point] = ()


class StageEnded(NamedTuple):
    """A stage that had started has ended; an artifact that is a model is registered as candidate."""

    stage: str
    status: Status
    artifact: Artifact | None = None
    error: str = ""  # one line


Event = (
    Progress
    | Metrics
    | Image
    | Text
    | Warning
    | RunStarted
    | ModelsDescribed
    | RunEnded
    | StagePlanned
    | StageHeld
    | StageStarted
    | StageCached
    | StageEnded
)


class Recorder(Protocol):
    """Where events go. Picklable, cheap, callable from any worker; it never raises."""

    def emit(self, event: Event) -> None: ...


class SilentRecorder:
    """A recorder that drops everything: for components used without a pipeline."""

    def emit(self, event: Event) -> None: ...


def now_ms() -> int:
    """Milliseconds since 1970."""
    return time.time_ns() // 1_000_000
