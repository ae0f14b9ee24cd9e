"""What `cascade rows` says of a row, for each shape of workflow."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from components.evaluation.rows_page import render_rows
from components.storage.artifact import Artifact
from pipelines import driver
from pipelines.rows import collect_result, options
from pipelines.workflow import PlannedStage

STATED: dict[str, dict[str, Any]] = {
    "evaluation": {
        "distances": [
            {"name": "noise", "distance": 300.0, "samples": 64, "purpose": "scale"},
            {"name": "base, 16²", "distance": 90.0, "samples": 256, "purpose": "model"},
        ],
        "held_out_codebook": {"codebook_usage": 0.9, "codebook_perplexity": 200.0},
    },
    "restoration": {"headline": {"psnr, inpainting": 21.0}},
}
DISTANCE = "distance, base, 16² (N 256)"
OF_TOKENS = {DISTANCE: 90.0, "codebook_usage": 0.9, "perplexity": 200.0}


@pytest.fixture
def finished(tmp_path: Path) -> Any:
    """The recipe as if all its stages had been run."""

    def make(recipe: str) -> driver.Prepared:
        prepared = driver.prepare(options(recipe, str(tmp_path / "runs"), None, "auto"))
        return replace(prepared, planned=[with_artifact(entry) for entry in prepared.planned])

    return make


def with_artifact(entry: PlannedStage) -> PlannedStage:
    name = entry.stage.name
    metadata = {"summary": {"train_seconds": 60.0, "held_out_bits_per_dim": 2.5}} | STATED.get(name, {})
    artifact = Artifact(kind="report", stage=name, key=entry.key, files=(), root=entry.store.uri, metadata=metadata)
    return entry._replace(cached=artifact)


@pytest.mark.parametrize(
    ("recipe", "figures", "seconds"),
    [
        ("vqgan", {"bits_per_dim": 2.5} | OF_TOKENS, 60.0),
        ("vqgan_transformer", {"bits_per_dim": 2.5} | OF_TOKENS, 120.0),
        ("cascade_1024", {"bits_per_dim": 2.5} | OF_TOKENS, 180.0),
        ("palette", {"bits_per_dim": 2.5, "psnr, inpainting": 21.0}, 60.0),
    ],
)
def test_a_row_says_what_its_models_studies_and_evaluation_state(
    finished: Any, recipe: str, figures: dict[str, float], seconds: float
) -> None:
    result = collect_result(finished(recipe))
    assert result is not None
    assert (result.recipe, result.figures, result.seconds) == (recipe, figures, seconds)
    assert recipe in render_rows([result])


def test_a_row_with_a_stage_to_run_says_nothing(finished: Any) -> None:
    prepared = finished("palette")
    first, *others = prepared.planned
    assert collect_result(replace(prepared, planned=[first._replace(cached=None), *others])) is None
