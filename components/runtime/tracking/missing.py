"""What MLflow should have of a finished training and has not: it was in a journal that was lost with its machine."""

from collections.abc import Iterable

from components.runtime.storage.artifact import Artifact
from components.runtime.tracking.runs import TrackedRun

PREVIEW = "preview.png"


def what_is_missing(artifact: Artifact, tracked: TrackedRun) -> str:
    """In words, the steps at which the recipe wants points and images and `tracked` has none; empty if it has all."""
    config = artifact.provenance.get("config", {}).get("optimization")
    if config is None:
        return ""  # no training
    total = config["total_steps"]
    points = scheduled(config["log_every"], total) - set().union(*tracked.steps.values())
    shown = {step for _, step in tracked.images}
    shows = bool(shown) or PREVIEW in artifact.names()  # not every model makes images
    images = scheduled(config["sample_every"], total) - shown if shows else set()
    found = {"points": points, "images": images}
    return " and ".join(f"{kind} of {in_words(steps)}" for kind, steps in found.items() if steps)


def scheduled(every: int, total: int) -> set[int]:
    """Multiples of `every` up to `total`, and `total`."""
    return {*range(every, total + 1, every), total}


def in_words(steps: Iterable[int]) -> str:
    first, *rest = sorted(steps)
    return f"{1 + len(rest)} steps from {first} to {rest[-1]}" if rest else f"step {first}"
