"""Laws of the commands that run many recipes: what is finished runs again only for an MLflow that does not know it,
and its figures are put into a file.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from components.configuration.usage import UsageError
from components.runtime import events
from components.runtime.storage.artifact import Artifact
from components.runtime.storage.store import Store
from components.runtime.tracking.tracker import Tracker
from pipelines.engine import driver
from pipelines.engine.recorder import EXPERIMENT
from pipelines.suites import compare
from pipelines.suites.compare import Comparison, run_compare
from pipelines.suites.lecture import Lecture, run_lecture
from pipelines.suites.runner import unknown_runs
from pipelines.workflow import PlannedStage

AWAY = "http://127.0.0.1:9"


@pytest.fixture
def tracking(empty_database: Path, tmp_path: Path) -> str:
    """An MLflow that knows nothing."""
    return f"sqlite:///{shutil.copy(empty_database, tmp_path)}"


def track(tracking: str, run: str, status: events.Status, folder: Path) -> None:
    tracker = Tracker(tracking, experiment=EXPERIMENT, spool=folder / "spool", flush_seconds=0.1)
    tracker.emit(events.RunStarted(run, "", {}, {"name": "some", "git_commit": "abc"}))
    assert tracker.close(status) == []


def test_mlflow_knows_a_run_that_ended_well_in_it(tracking: str, tmp_path: Path) -> None:
    runs = ["one", "two", "three"]
    assert unknown_runs(runs, tracking=tracking) == {*runs}
    track(tracking, "one", "FINISHED", tmp_path)
    track(tracking, "two", "FAILED", tmp_path)
    assert unknown_runs(runs, tracking=tracking) == {"two", "three"}
    assert unknown_runs(runs, tracking=f"sqlite:///{tmp_path}/new.db") == {*runs}
    assert not (tmp_path / "new.db").exists()


@pytest.mark.parametrize("tracking", ["none", AWAY])
def test_an_mlflow_that_can_not_be_filled_is_not_waited_for(tracking: str) -> None:
    assert unknown_runs(["one"], tracking=tracking) == set()


def with_artifact(entry: PlannedStage) -> PlannedStage:
    metadata = {"summary": {"train_seconds": 60.0, "parameters": 1000}}
    origin: dict[str, Any] = {"git_commit": f"{0xABC:040x}"[::-1], "started": 0.0, "seconds": 86400.0}
    origin["code"] = {"python": "3.11", "modules": {"a.py": ["text", "tree"]}}
    artifact = Artifact(kind="report", stage=entry.stage.name, key=entry.key, files=(), root=entry.store.uri)
    return entry._replace(cached=artifact.model_copy(update={"metadata": metadata, "provenance": origin}))


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The runs that a command starts, though every stage of every recipe is finished."""
    prepare, found = driver.prepare, []

    def prepared(options: driver.RunOptions) -> driver.Prepared:
        made = prepare(options)
        made.root.write(f"runs/{made.run}/report.html", b"a report")
        made.root.write(f"runs/{made.run}/plan.json", b'{"facts": {"machine": "2 cores"}}')
        return replace(made, planned=[with_artifact(entry) for entry in made.planned])

    def run(options: driver.RunOptions, console: Console) -> int:
        found.append(prepared(options).run)
        return driver.DONE

    monkeypatch.setattr(driver, "prepare", prepared)
    monkeypatch.setattr(driver, "run", run)
    few = {name: compare.SYSTEMS[name] for name in (*compare.DIFFUSION, compare.RIVAL)}
    monkeypatch.setattr(compare, "SYSTEMS", few)  # each budget of each is prepared
    return found


QUIET = Console(quiet=True)
COMMANDS: dict[str, Callable[..., int]] = {
    "lecture": lambda **options: run_lecture(Lecture(**options), ["gan"], QUIET),
    "compare": lambda **options: run_compare(Comparison(**options), ["gan"], QUIET, seed=0, minutes=[2]),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_finished_runs_again_for_an_mlflow_that_does_not_know_it_and_only_for_it(
    command: str, ran: list[str], tracking: str, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"storage": Store(str(tmp_path / "runs")).uri, "profile": "auto"}
    assert COMMANDS[command](tracking=tracking, **options) == driver.DONE
    (run,) = ran
    track(tracking, run, "FINISHED", tmp_path)
    for knows in (tracking, "none"):
        COMMANDS[command](tracking=knows, **options)
        assert ran == [run]


@pytest.mark.parametrize(("command", "recipe", "minutes"), [("lecture", "gan", 0), ("compare", "gan_32", 2)])
def test_figures_of_what_is_finished_are_put_into_a_file_with_their_commit_date_and_machine(
    command: str, recipe: str, minutes: int, ran: list[str], tmp_path: Path
) -> None:
    file, other = tmp_path / "results.json", {"recipe": "other", "seed": 3, "train_seconds": 1.0}
    before = {"recipe": recipe, "note": "measured before"}
    old = {command: [before | ({"minutes": minutes} if minutes else {}), other], "demo": [{"recipe": "openmoji"}]}
    file.write_text(json.dumps(old))
    options: dict[str, Any] = {"storage": str(tmp_path / "runs"), "tracking": "none", "profile": "auto"}
    assert COMMANDS[command](figures=file, **options) == driver.DONE
    figures = json.loads(file.read_text())
    results = {(entry["recipe"], entry.get("seed", 0), entry.get("minutes", 0)): entry for entry in figures[command]}
    assert (
        results[recipe, 0, minutes].items()
        >= {"commit": "cba000000000", "date": "1970-01-02", "machine": "2 cores"}.items()
    )
    assert results[recipe, 0, minutes]["train_seconds"] == 60.0
    assert results[recipe, 0, minutes]["code"].startswith("3.11:")
    assert "note" not in results[recipe, 0, minutes]
    assert (results["other", 3, 0], figures["demo"]) == (other, old["demo"])
    assert len(results) > 10
    assert not [entry for entry in figures[command] if "images" in entry or "samples" in entry]


def test_a_file_of_something_else_is_refused_before_anything_runs(ran: list[str], tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    file.write_text('[{"name": "unet"}]')
    options: dict[str, Any] = {"storage": str(tmp_path / "runs"), "tracking": "none", "profile": "auto"}
    with pytest.raises(UsageError, match=r"bench\.json holds no figures of a lecture or a comparison"):
        COMMANDS["lecture"](figures=file, **options)
    with pytest.raises(UsageError, match=r"--json .* is a folder: name a file in it"):
        COMMANDS["lecture"](figures=tmp_path, **options)
    with pytest.raises(UsageError, match=r"--json .*new/figures\.json: there is no such folder"):
        COMMANDS["lecture"](figures=tmp_path / "new" / "figures.json", **options)
    assert ran == []
    assert file.read_text() == '[{"name": "unet"}]'
