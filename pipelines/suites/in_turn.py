"""Several recipes run in turn by one command, and what is finished of each."""

from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

from rich.console import Console

from components.configuration.optimization import Training
from components.runtime.storage.artifact import Artifact
from components.runtime.tracking.environment import environment
from pipelines.engine import driver
from pipelines.engine.recorder import EXPERIMENT
from pipelines.engine.session import set_environment
from pipelines.planning.profiles import tracking_uri


class Finished(NamedTuple):
    """What there is of a recipe."""

    artifacts: dict[str, Artifact]  # by stage
    trained: dict[str, Artifact]  # those that a training left
    missing: tuple[str, ...]  # stages that are not finished

    @property
    def train_seconds(self) -> float | None:
        """Of all trainings together; None without any."""
        return sum(found.metadata["summary"].get("train_seconds", 0.0) for found in self.trained.values()) or None


def left_to_run(
    chosen: Collection[str], finished: Mapping[str, str], *, tracking: str | None, what: str, console: Console
) -> list[str]:
    """Those of the recipes that are not finished, and those that are and that MLflow does not know.

    Args:
        finished: recipe -> its run.
        what: the recipes are called.
    """
    lost = unknown_runs(finished.values(), tracking=tracking)
    again = [recipe for recipe in finished if finished[recipe] in lost]
    if finished:
        console.print(f"{len(finished)} of {len(chosen)} {what} are finished", highlight=False)
    if again:
        console.print(f"{len(again)} of them are not in MLflow, and are sent again", highlight=False)
    return [recipe for recipe in chosen if recipe not in finished or recipe in again]


def unknown_runs(runs: Collection[str], *, tracking: str | None) -> set[str]:
    """Those that MLflow does not know as ended well: it is new, or was away. None while it is away or turned off."""
    uri = tracking_uri(tracking)
    if uri is None or not runs:
        return set()
    from components.runtime.tracking.runs import finished_runs  # MLflow takes seconds to import

    set_environment(environment())
    try:
        return {*runs} - finished_runs(uri, experiment=EXPERIMENT)
    except Exception:  # a database or a network may raise anything, and what is away can't be filled
        return set()


def run_in_turn(
    titles: Mapping[str, str],
    options: Callable[[str], driver.RunOptions],
    *,
    after: Callable[[], None],
    console: Console,
) -> int:
    """Run recipes; what is finished is cached. Returns 1 if one failed, 130 at once if interrupted.

    Args:
        titles: recipe -> how it is announced.
        options: of each recipe.
        after: called after each.
    """
    failed = []
    for number, (recipe, title) in enumerate(titles.items(), start=1):
        console.rule(f"{number} of {len(titles)}: {title}")
        code = driver.run(options(recipe), console)
        after()
        if code == driver.INTERRUPTED:
            return code
        failed += [recipe] if code != driver.DONE else []
    if failed:
        console.print(f"failed: {', '.join(failed)}; the same command goes on from here", style="red")
    return driver.FAILED if failed else driver.DONE


def finished_stages(prepared: driver.Prepared) -> Finished:
    artifacts = {entry.stage.name: entry.cached for entry in prepared.planned if entry.cached is not None}
    trained = {
        entry.stage.name: artifacts[entry.stage.name]
        for entry in prepared.planned
        if isinstance(entry.stage.config, Training) and entry.stage.name in artifacts
    }
    return Finished(artifacts, trained, tuple(entry.stage.name for entry in prepared.planned if entry.cached is None))
