"""`cascade promote`: make another version of a registered model its champion, by hand."""

from components.configuration.usage import UsageError
from components.runtime.tracking.names import REGISTRY, environment
from components.runtime.tracking.promotion import promote_by_hand
from pipelines.engine.session import set_environment
from pipelines.planning.profiles import tracking_uri


def promote_version(model: str, *, back: bool, tracking: str | None) -> str:
    """Move the champion's alias; returns lines about the new champion and the way back.

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
