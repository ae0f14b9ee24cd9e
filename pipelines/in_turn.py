"""Several recipes run in turn by one command, and what is finished of each."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from rich.console import Console

from components.configuration.optimization import Training
from components.storage.artifact import Artifact
from pipelines import driver


class Finished(NamedTuple):
    """What there is of a recipe."""

    artifacts: dict[str, Artifact]  # by stage
    trained: dict[str, Artifact]  # those that a training left
    missing: tuple[str, ...]  # stages that are not finished

    @property
    def train_seconds(self) -> float | None:
        """Of all trainings together; None without any."""
        return sum(found.metadata["summary"].get("train_seconds", 0.0) for found in self.trained.values()) or None


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
