"""CONTRIBUTING.md's walk-throughs do what they say: applied to a copy, each is found wherever users look."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = "CONTRIBUTING.md"
PATCH = re.compile(r"^```diff\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FOUND = """
import json, sys
import numpy as np
from components.data.ingest import open_source
from components.data.source_check import detect_source, source_digest
from components.evaluation.metrics import measured_row
from components.evaluation.metrics import METRICS, Compared, gaussian_of
from components.evaluation.report import ReportData, render_report
from components.runtime.storage.artifact import Artifact
from pipelines.suites.compare import COLUMNS
from pipelines.suites.lecture import SLIDES, chosen_rows, figures_of
from tests.golden_keys import GOLDEN, current_keys
from tests.row_documents import rows_text
from components.models.diffusion.betas import SCHEDULES
from components.models.diffusion.steps import SAMPLERS
from components.evaluation.noising_study import draw_schedules
from components.models.diffusion.schedule import make_schedule
from components.sampling.requests import Request, form_choices, form_fields
from pipelines.recipes.catalog import load_recipe, RECIPES
from tests.serving_documents import openapi_text
recipe = load_recipe("openmoji", ["base.schedule=quarter_circle", "sampling.base.sampler=euler_ancestral"])
features = np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32)
row = measured_row("tokens", "model", Compared(features[:20], features, gaussian_of(features), seed=0), [*METRICS])
report = Artifact(kind="report", stage="evaluation", key="k", files=(), metadata={"distances": [row.model_dump()]})
golden = dict(line.split()[:2] for line in GOLDEN.read_text().splitlines() if not line.startswith("#"))
gradients = open_source(*detect_source("gradients"), limit=4)
json.dump({
    "row": row.model_dump(), "columns": COLUMNS, "figures": figures_of({"evaluation": report}, {}),
    "page": render_report(ReportData(run="r", recipe="x", recipe_yaml="", stages=(), distances=(row,))),
    "mlflow": row.metrics("net"), "moved": [name for name, key in current_keys().items() if key != golden[name]],
    "measured": load_recipe("openmoji", ["evaluation.metrics=[distance,kernel]"]).evaluation.metrics,
    "rows": chosen_rows([]), "lines": rows_text(), "slides": [name for slide in SLIDES for name in slide.recipes],
    "captions": [item.caption for item in gradients.items], "digest": source_digest("gradients", None),
    "drawn_size": gradients.reader.draw(gradients.items[0], b"", resolution=8).image.size,
    "trained": load_recipe("smoke", ["images.source=gradients"]).images.source,
    "samplers": [*SAMPLERS], "schedules": [*SCHEDULES], "choices": form_choices(), "fields": [*form_fields()],
    "api": openapi_text(), "options": [*Request.model_fields], "recipe": recipe.model_dump_json(),
    "studied": load_recipe("fashion_steps", []).model_dump_json(), "recipes": [*RECIPES],
    "drawn": draw_schedules(make_schedule("cosine", num_train_timesteps=50), salt=""),
}, sys.stdout)
"""


@pytest.fixture(scope="module")
def copy(repository: Path, tracked_files: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository with every walk-through applied."""
    folder = tmp_path_factory.mktemp("contributing")
    for path in tracked_files:
        place = folder / path.relative_to(repository)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, place)
    patches = PATCH.findall((repository / PAGE).read_text())
    assert len(patches) >= 6
    for patch in patches:
        run = subprocess.run(["git", "apply", "-"], cwd=folder, input=patch, capture_output=True, text=True)
        assert run.returncode == 0, f"{PAGE}: this patch does not apply any more ({run.stderr.strip()}):\n{patch}"
    return folder


def answer(copy: Path, *arguments: str) -> str:
    """Output of Python in the copy. A failure is shown whole."""
    environment = {**os.environ, "PYTHONPATH": str(copy), "COLUMNS": "200"}
    run = subprocess.run([sys.executable, *arguments], cwd=copy, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


@pytest.fixture(scope="module")
def found(copy: Path) -> dict:
    return json.loads(answer(copy, "-c", FOUND).splitlines()[-1])


@pytest.fixture(scope="module")
def command_help(copy: Path) -> str:
    return answer(copy, "-m", "pipelines", "sample", "--help")


def test_a_sampler_stands_in_help_api_page_recipe_and_study(found: dict, command_help: str) -> None:
    for place in (command_help, *(found[name] for name in ("samplers", "api", "recipe", "studied"))):
        assert "euler_ancestral" in place
    assert ["euler_ancestral", "Euler, ancestral"] in found["choices"]["sampler"]


def test_a_schedule_stands_in_recipe_and_study(found: dict) -> None:
    assert all("quarter_circle" in found[name] for name in ("schedules", "recipe", "drawn"))


def test_an_option_stands_in_help_api_and_page(found: dict, command_help: str) -> None:
    assert "threshold" in found["options"]
    assert "--threshold" in command_help
    assert "Of each predicted image: static, dynamic or none." in found["api"]
    assert "threshold" in found["fields"]


def test_a_metric_is_measured_shown_compared_and_moves_the_keys_of_evaluations_alone(found: dict) -> None:
    value = found["row"]["kernel"]
    assert found["moved"] == ["scenes/evaluation", "openmoji/evaluation", "smoke/evaluation"]
    assert "kernel" in found["columns"]
    assert "Kernel distance" in found["page"]
    assert f"{value:.4f}" in found["page"]
    assert found["figures"]["kernel, tokens (N 20)"] == found["mlflow"]["mmd_net_tokens"] == value
    assert found["measured"] == ["distance", "kernel"]


def test_a_row_stands_in_the_catalog_on_its_slide_and_on_the_page_of_rows(found: dict) -> None:
    assert "fsq_coarse" in found["recipes"]
    assert found["rows"]["fsq_coarse"] == "T5"
    assert "fsq_coarse" in found["slides"]
    assert "| T5 | fewer codes | `fsq_coarse` | `numerics/" in found["lines"]


def test_a_source_is_found_by_name_listed_and_drawn(found: dict) -> None:
    assert sorted(found["captions"])[:2] == ["black to blue", "black to green"]
    assert found["drawn_size"] == [8, 8]
    assert len(found["digest"]) == 64
    assert found["trained"] == "gradients"


def test_the_laws_of_samplers_and_schedules_are_run_over_the_new_ones(copy: Path) -> None:
    laws = ["tests/numerics/test_samplers.py", "tests/numerics/test_schedule.py"]
    flags = ["-q", "-p", "no:cacheprovider", "-k", "euler_ancestral or quarter_circle"]
    text = answer(copy, "-m", "pytest", *flags, *laws)
    passed = re.search(r"(\d+) passed", text)
    assert passed is not None, text
    assert int(passed.group(1)) >= 8, text
