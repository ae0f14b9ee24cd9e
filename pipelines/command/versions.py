"""Other versions of a model: `cascade ema` with an average of another length, `cascade promote`."""

from pathlib import Path
from typing import NamedTuple

from components.configuration.usage import UsageError
from components.models.bundle import DESCRIPTION
from components.runtime.tracking.names import REGISTRY, environment
from components.runtime.tracking.promotion import promote_by_hand
from components.runtime.tracking.registry import register_average
from components.training.results import choose_average
from pipelines.command.loading import local_model
from pipelines.engine.session import set_environment
from pipelines.planning.profiles import tracking_uri


class Average(NamedTuple):
    """Where a model with another average is."""

    folder: Path
    registered: str  # models:/NAME/VERSION; empty if the model that it was made of is no registered one


def write_average(model: str, *, length: float, tracking: str | None, out: Path) -> Average:
    """Write the model with an average of another length, a share of training in (0, 0.28), to `out`.

    An average of a registered model becomes a version of its name too, and its candidate.

    Raises UsageError for a model that is not there or kept no snapshots, a length that has no average, and a folder
    that holds something.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"--out {out} holds something already: name a new folder")
    try:
        with local_model(model, tracking) as folder:
            if not (folder / DESCRIPTION).is_file():
                raise UsageError(f"{model} is a whole cascade, which keeps no snapshots: give the model of one stage")
            try:
                choose_average(folder, out, sigma_rel=length)
            except ValueError as error:
                raise UsageError(f"{model}: {error}") from error
        registry = tracking_uri(tracking) if model.startswith(REGISTRY) else None
        if registry is None:
            return Average(out, "")
        made = register_average(model, out, sigma_rel=length, tracking_uri=registry)
    except ValueError as error:
        raise UsageError(str(error)) from error
    return Average(out, f"{REGISTRY}{made.name}/{made.version}")


def promote_version(model: str, *, back: bool, tracking: str | None) -> str:
    """Move the champion's alias to another version by hand; returns lines about it and the way back.

    Raises UsageError if there is no such version.
    """
    set_environment(environment())
    registry = tracking_uri(tracking)
    if registry is None:
        raise UsageError(f"{model} is in a registry: name it with --tracking")
    try:
        name, version, before = promote_by_hand(model, tracking_uri=registry, back=back)
    except ValueError as error:
        raise UsageError(str(error)) from error
    again = "" if before in (None, version) else f"; to take it back: cascade promote {name}@{before}"
    return f"{REGISTRY}{name}@champion is version {version}{again}"
