"""The commands as functions of a program: `from image_cascade import load, plan, run` (docs/API.md)."""

import io
from typing import Any

from rich.console import Console

from components.runtime.storage.artifact import Artifact
from components.sampling.cascade import Cascade
from pipelines.command.loading import load_cascade
from pipelines.engine import driver
from pipelines.recipes.catalog import DEMO
from pipelines.workflow import PlannedStage


class RunError(RuntimeError):
    """A failed run; the message names each failed stage with the reason. `run` again goes on from there."""


def load(model: str, *, tracking: str | None = None) -> Cascade:
    """Loads the trained cascade at an address on the best device.

    Args:
        model: `models:/NAME@ALIAS` or `models:/NAME/VERSION` in the registry, the folder of a model's stage in any
            storage, or a folder on disk.
        tracking: address of MLflow; None: as the commands, MLFLOW_TRACKING_URI or `./runs/mlflow.db`.
    Raises ValueError or UsageError, in one line, if there is none or a file differs from what was registered."""
    return load_cascade(model, tracking)


def plan(recipe: str = DEMO, **options: Any) -> list[PlannedStage]:
    """Plans a recipe: key, folder in storage, cached artifact and state of each stage, in order.
    The state tells whether the stage is to run. `recipe`: its name, or a YAML file as `cascade show NAME` writes it.
    `options`: fields of `pipelines.engine.driver.RunOptions`, such as `set=["base.total_steps=500"]` or `storage`.
    Raises UsageError, StoreError or SourceError, in one line, for what can't run."""
    return driver.prepare(driver.RunOptions(recipe, **options)).planned


def run(recipe: str = DEMO, **options: Any) -> dict[str, Artifact]:
    """Runs the stages of a recipe that are not cached, from the program's main thread.
    Takes what `plan` takes. Returns stage -> artifact, of those that are finished. Raises RunError if a stage failed,
    KeyboardInterrupt if the run was interrupted, and what `plan` raises before anything is started."""
    printed = io.StringIO()
    code = driver.run(driver.RunOptions(recipe, **options), Console(file=printed, width=200))
    if code == driver.INTERRUPTED:
        raise KeyboardInterrupt
    if code not in (driver.DONE, driver.UNREGISTERED):
        lines = printed.getvalue().splitlines()
        raise RunError(" ".join(line for line in lines if line.startswith(("failed: ", "details: "))))
    planned = plan(recipe, **options)
    return {entry.stage.name: entry.cached for entry in planned if entry.cached is not None}
