"""What MLflow lacks of a finished training is named by its steps; what the recipe never wanted is not missed."""

import pytest

from components.configuration.optimization import OptimizationConfig
from components.runtime.storage.artifact import Artifact, FileEntry
from components.runtime.tracking.runs import TrackedRun, what_is_missing

OPTIMIZATION = OptimizationConfig(
    total_steps=50, global_batch_size=8, learning_rate=1e-3, warmup_steps=0, log_every=20, sample_every=25
)
TRAINING = {"optimization": OPTIMIZATION.model_dump()}


def artifact(config: dict, *names: str) -> Artifact:
    files = tuple(FileEntry(path=name, bytes=1, sha256="0" * 64) for name in names)
    return Artifact(kind="model", stage="base", key="k", files=files, provenance={"config": config})


def arrived(points: set[int], images: set[int] = frozenset()) -> TrackedRun:
    return TrackedRun("r", 0, False, {"loss": set(points)}, {("grid", step) for step in images})


@pytest.mark.parametrize(
    ("config", "names", "tracked", "words"),
    [
        (TRAINING, [], arrived({20, 40, 50}), ""),
        (TRAINING, [], arrived({20, 50}), "points of step 40"),
        (TRAINING, [], arrived(set()), "points of 3 steps from 20 to 50"),
        (TRAINING, ["preview.png"], arrived({20, 40, 50}, {25, 50}), ""),
        (TRAINING, ["preview.png"], arrived({20, 40, 50}), "images of 2 steps from 25 to 50"),
        (TRAINING, [], arrived({20, 50}, {50}), "points of step 40 and images of step 25"),
        ({"limit": 5}, [], arrived(set()), ""),
    ],
)
def test_what_is_missing_is_named(config: dict, names: list[str], tracked: TrackedRun, words: str):
    assert what_is_missing(artifact(config, *names), tracked) == words
