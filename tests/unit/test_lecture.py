"""What `cascade lecture` says of a recipe, for each shape of workflow, and when it writes its page."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from components.data.errors import SourceError
from components.data.sources import fashion_mnist
from components.runtime.storage.artifact import Artifact
from components.runtime.storage.store import Store
from pipelines.engine import driver
from pipelines.recipes.catalog import ROWS
from pipelines.recipes.fashion import FASHION
from pipelines.suites.lecture import PAGE, LecturePage, chosen_rows, collect_result, options, run_lecture
from pipelines.workflow import PlannedStage
from tests.image_sets import write_idx

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
OF_TOKENS = {DISTANCE: 90.0, "codes in use, %": 90.0, "perplexity": 200.0}


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
        ("cascade_1024", {"bits_per_dim": 2.5} | OF_TOKENS, 240.0),
        ("palette", {"bits_per_dim": 2.5, "psnr, inpainting": 21.0}, 60.0),
    ],
)
def test_a_row_says_what_its_models_studies_and_evaluation_state(
    finished: Any, recipe: str, figures: dict[str, float], seconds: float
) -> None:
    result = collect_result(finished(recipe))
    assert (result.recipe, result.figures, result.seconds) == (recipe, figures, seconds)
    assert result.missing == ()


def test_a_row_with_a_stage_to_run_says_which_and_keeps_what_the_others_state(finished: Any) -> None:
    prepared = finished("palette")
    first, *others = prepared.planned
    result = collect_result(replace(prepared, planned=[first._replace(cached=None), *others]))
    assert result.missing == (first.stage.name,)
    assert result.report == ""
    assert result.figures["psnr, inpainting"] == 21.0


def test_rows_without_their_images_are_known_before_anything_runs_and_the_page_is_there_by_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fashion_mnist, "INSTALLED", str(tmp_path / "nothing"))
    root = Store(str(tmp_path / "runs"))
    page = LecturePage(root, None, "auto")
    page.write()
    away = {recipe: found.obstacle for recipe, found in page.results.items() if found.obstacle}
    assert set(away) == {recipe.__name__ for recipe in FASHION}
    assert all("dataset-fashion-mnist" in reason for reason in away.values())
    assert len(page.results) == len(ROWS)
    root.delete(PAGE)
    with pytest.raises(SourceError, match="dataset-fashion-mnist"):
        run_lecture(["D4"], storage=root.uri, tracking=None, profile="auto", console=Console(quiet=True))
    assert "dataset-fashion-mnist" in root.read(PAGE).decode()


def test_what_is_finished_is_read_once(finished: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fashion_mnist, "INSTALLED", str(tmp_path / "set"))  # on any machine
    write_idx(tmp_path / "set", np.zeros((2, 28, 28), np.uint8), np.zeros(2, np.uint8), compress=True)
    page = LecturePage(Store(str(tmp_path / "runs")), None, "auto")
    page.results = {recipe: collect_result(finished(recipe)) for recipe in chosen_rows([])}
    kept = dict(page.results)
    page.write()
    assert all(page.results[recipe] is result for recipe, result in kept.items())
    page.results["gan"] = kept["gan"].model_copy(update={"missing": ("samples",)})
    page.write()
    assert page.results["gan"].missing == ("images", "gan", "cascade", "samples", "evaluation")


def test_a_recipe_with_all_its_stages_and_its_report_is_not_run_again(finished: Any, tmp_path: Path) -> None:
    page = LecturePage(Store(str(tmp_path / "runs")), None, "auto")
    result = page.results["gan"] = collect_result(finished("gan"))
    assert not page.is_finished("gan")
    page.root.write(result.report, b"a report")
    assert page.is_finished("gan")
    page.results["gan"] = result.model_copy(update={"missing": ("samples",)})
    assert not page.is_finished("gan")
