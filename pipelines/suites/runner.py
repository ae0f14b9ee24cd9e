"""Runner of the many recipes of a command: unfinished recipes in turn, a page, and figures as JSON."""

import datetime
import json
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import rich.table
from pydantic import TypeAdapter, ValidationError
from rich.console import Console

from components.configuration.config import Config
from components.configuration.optimization import Training
from components.configuration.usage import UsageError, check_figures
from components.data.listing import SourceError
from components.evaluation.report import Table
from components.runtime.storage.artifact import Artifact
from components.runtime.storage.garbage import PLAN
from components.runtime.storage.store import Store
from components.runtime.tracking.names import environment
from components.sampling.frozen_text import FrozenTextError
from pipelines.engine import driver
from pipelines.engine.code_seen import code_digest
from pipelines.engine.display import say
from pipelines.engine.provenance import short
from pipelines.engine.recorder import EXPERIMENT
from pipelines.engine.session import set_environment
from pipelines.planning.profiles import storage_uri, tracking_uri
from pipelines.recipes.catalog import RECIPES, varied
from pipelines.recipes.rows import MINUTES


class Key(NamedTuple):
    """A recipe with differences from the catalog's."""

    recipe: str
    seed: int = 0  # of trainings and samples
    minutes: int = 0  # budget of all trainings together; 0: as the recipe has it
    source: str = ""  # set of images; empty: the recipe's


class Stages(NamedTuple):
    """Finished stages of a recipe."""

    artifacts: dict[str, Artifact]  # by stage
    trained: dict[str, Artifact]  # those that a training left
    missing: tuple[str, ...]  # stages that are not finished

    def summed(self, name: str) -> float | None:
        """Sum of a figure over all trainings; None without any."""
        return sum(artifact.metadata["summary"].get(name, 0.0) for artifact in self.trained.values()) or None


class Result(Config):
    """State of a recipe with a seed in a storage, or figures of a recipe in a JSON file.
    That file keeps all fields but those that are excluded."""

    recipe: str
    seed: int = 0  # of trainings and samples
    train_seconds: float | None = None  # of all its trainings
    missing: tuple[str, ...] = ()  # stages that are not finished
    obstacle: str = ""  # why it can't be run here
    commit: str = ""  # of the code that finished it
    date: str = ""  # that it was finished on, in UTC
    machine: str = ""  # its cores and devices, as the run states them
    code: str = ""  # digest of the code that made its stages, as `code_digest` has it
    note: str = ""  # words of who measured it, for docs/RESULTS.md


R = TypeVar("R", bound=Result)
FIGURES = TypeAdapter(dict[str, list[dict[str, Any]]])


class Suite(ABC, Generic[R]):
    """Recipes with results in a storage, and a page of the results. A finished recipe is read once."""

    name: ClassVar[str]  # of the command, and of its figures in a JSON file
    page: ClassVar[str]  # file in the storage

    def __init__(self, storage: str | None, *, tracking: str | None, profile: str, figures: Path | None = None) -> None:
        """The JSON file `figures` gets the figures of all finished recipes when the page is written.
        Raises UsageError if its folder is missing."""
        check_figures(figures)
        self.root, self.tracking, self.profile = Store(storage_uri(storage)), tracking, profile
        self.figures = figures
        self.results: dict[Key, R] = {}
        self.runs: dict[Key, str] = {}

    @abstractmethod
    def keys(self) -> list[Key]:
        """Recipes and seeds of the page, in the order of the page."""

    @abstractmethod
    def result(self, key: Key, stages: Stages) -> R:
        """The result in the finished stages of a recipe."""

    @abstractmethod
    def render(self) -> str:
        """The page as HTML without script, of all results."""

    def read(self) -> None:
        """Read unfinished recipes again."""
        for key in self.keys():
            if key not in self.results or self.results[key].missing:
                self.results[key] = self.collect(key)

    def write(self) -> None:
        """Read unfinished recipes again, then write the page, and the file of figures if a name is given.
        Raises UsageError if that file holds something else."""
        self.read()
        self.root.write(self.page, self.render().encode())
        if self.figures is not None:
            finished = (result for result in self.results.values() if not result.missing)
            save_figures(self.figures, self.name, finished)

    def collect(self, key: Key) -> R:
        """The result of a recipe, or the obstacle to running the recipe here."""
        try:
            prepared = driver.prepare(self.options(key))
        except (SourceError, FrozenTextError) as error:
            stages = Stages({}, {}, ("images",))
            return self.result(key, stages).model_copy(update={"obstacle": str(error)})
        self.runs[key] = prepared.run
        stages = finished_stages(prepared)
        return self.result(key, stages).model_copy(update=origin(self.root, prepared.run, stages.artifacts.values()))

    def options(self, key: Key) -> driver.RunOptions:
        """Options of a run. Models of what differs from the recipe have another name: it keeps the champion."""
        recipe, seed, minutes, source = key
        told = (source, f"{minutes}_minutes" * bool(minutes), f"seed_{seed}" * bool(seed))
        return driver.RunOptions(
            recipe=recipe,
            set=[
                *varied(RECIPES[recipe](), seed=seed, factor=minutes / MINUTES or 1),
                *(f"images.{of}" for of in (f"source={source}", "limit=3773") if source),
            ],
            name="_".join([recipe, *filter(None, told)]) if any(told) else None,
            storage=self.root.uri,
            tracking=self.tracking,
            profile=self.profile,
        )

    def is_finished(self, key: Key) -> bool:
        """True if every stage of the recipe is finished and the report is written."""
        return not self.results[key].missing and self.root.exists(f"runs/{self.runs[key]}/report.html")

    def run(self, titles: Mapping[Key, str], *, noun: str, console: Console) -> int:
        """Run unfinished recipes in turn, and finished recipes unknown to MLflow, to send results again.
        `titles`: announcement of each key. `noun`: name of the recipes, in the plural. Returns 1 if one
        failed, 3 if MLflow lacks a part of one, 130 at once if interrupted."""
        finished = [key for key in titles if self.is_finished(key)]
        unknown = unknown_runs({self.runs[key] for key in finished}, tracking=self.tracking)
        again = [key for key in finished if self.runs[key] in unknown]
        if finished:
            say(console, f"{len(finished)} of {len(titles)} {noun} are finished")
        if again:
            say(console, f"{len(again)} of them are not in MLflow, and are sent again")
        left, failed, worst = [key for key in titles if key not in finished or key in again], [], driver.DONE
        for number, key in enumerate(left, start=1):
            console.rule(f"{number} of {len(left)}: {titles[key]}")
            code = driver.run(self.options(key), console)
            self.write()
            if code == driver.INTERRUPTED:
                return code
            worst = max(worst, code if code == driver.UNREGISTERED else driver.DONE)
            failed += [titles[key]] if code not in (driver.DONE, driver.UNREGISTERED) else []
        if failed:
            say(console, f"failed: {', '.join(failed)}; the same command goes on from here", "red")
        return driver.FAILED if failed else worst


def finished_stages(prepared: driver.Prepared) -> Stages:
    """The finished stages of a prepared run, and names of the unfinished."""
    artifacts = {entry.stage.name: entry.cached for entry in prepared.planned if entry.cached is not None}
    trainings = [entry.stage.name for entry in prepared.planned if isinstance(entry.stage.config, Training)]
    trained = {name: artifacts[name] for name in trainings if name in artifacts}
    return Stages(artifacts, trained, tuple(entry.stage.name for entry in prepared.planned if entry.cached is None))


def unknown_runs(runs: Collection[str], *, tracking: str | None) -> set[str]:
    """Runs that MLflow doesn't hold as finished; none while MLflow is away or turned off."""
    uri = tracking_uri(tracking)
    if uri is None or not runs:
        return set()
    from components.runtime.tracking.runs import run_statuses  # MLflow takes seconds to import

    set_environment(environment())
    try:
        statuses = run_statuses(uri, experiment=EXPERIMENT)
        return {run for run in runs if statuses.get(run) != "FINISHED"}
    except Exception:  # a database or a network may raise anything, and what is away can't be filled
        return set()


def origin(root: Store, run: str, artifacts: Iterable[Artifact]) -> dict[str, str]:
    """Commit and date of the newest artifact, digest of the code of all, and the machine of the run."""
    made = {artifact.stage: artifact.provenance for artifact in artifacts}
    provenances = [provenance for provenance in made.values() if "started" in provenance]
    if not provenances:
        return {}
    last = max(provenances, key=lambda provenance: provenance["started"] + provenance["seconds"])
    ended = datetime.datetime.fromtimestamp(last["started"] + last["seconds"], datetime.UTC)
    plan = f"runs/{run}/{PLAN}"
    machine = json.loads(root.read(plan))["facts"]["machine"] if root.exists(plan) else ""
    code = code_digest({stage: provenance.get("code") for stage, provenance in made.items()})
    of = {"commit": short(last.get("git_commit", "")), "date": ended.date().isoformat()}
    return of | {"machine": machine, "code": code}


def read_figures(file: Path) -> dict[str, list[dict[str, Any]]]:
    """Results by suite from a file of `save_figures`; none if there is no file. Raises UsageError."""
    if not file.exists():
        return {}
    try:
        return FIGURES.validate_json(file.read_bytes())
    except ValidationError as error:
        raise UsageError(f"{file} holds no figures of a lecture or a comparison; name another file") from error


def key_of(entry: Mapping[str, Any]) -> Key:
    """The key of a result in a JSON file, where defaults are left out."""
    return Key(**{name: entry[name] for name in Key._fields if name in entry})


def save_figures(file: Path, suite: str, results: Iterable[Result]) -> None:
    """Put results into a JSON file, in place of entries of the same key; the rest stays."""
    suites = read_figures(file)
    entries = {key_of(entry): entry for entry in suites.get(suite, [])}
    for result in results:
        entry = result.model_dump(mode="json", exclude_defaults=True)
        entries[key_of(entry)] = entry
    text = json.dumps(suites | {suite: [*entries.values()]}, indent=1, ensure_ascii=False)
    part = file.with_name(f"{file.name}.part")
    part.write_text(f"{text}\n")
    part.replace(file)


def shown_table(table: Table, *, title: str) -> rich.table.Table:
    """A table for the console."""
    shown = rich.table.Table(*table.columns, title=title, title_justify="left")
    for row in table.rows:
        shown.add_row(*map(str, row))
    return shown
