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
from components.models.diffusion.betas import SCHEDULES
from components.models.diffusion.steps import SAMPLERS
from components.evaluation.noising_study import draw_schedules
from components.models.diffusion.schedule import make_schedule
from components.sampling.requests import Request, form_choices, form_fields
from pipelines.recipes.catalog import load_recipe, RECIPES
from tests.serving_documents import openapi_text
recipe = load_recipe("openmoji", ["base.schedule=quarter_circle", "sampling.base.sampler=euler_ancestral"])
json.dump({
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
    assert len(patches) >= 3
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
    assert "euler_ancestral" in found["samplers"]
    assert "euler_ancestral" in command_help
    assert "euler_ancestral" in found["api"]
    assert ["euler_ancestral", "Euler, ancestral"] in found["choices"]["sampler"]
    assert "euler_ancestral" in found["recipe"]
    assert "euler_ancestral" in found["studied"]


def test_a_schedule_stands_in_recipe_and_study(found: dict) -> None:
    assert "quarter_circle" in found["schedules"]
    assert "quarter_circle" in found["recipe"]
    assert "quarter_circle" in found["drawn"]


def test_an_option_stands_in_help_api_and_page(found: dict, command_help: str) -> None:
    assert "threshold" in found["options"]
    assert "--threshold" in command_help
    assert "Of each predicted image: static, dynamic or none." in found["api"]
    assert "threshold" in found["fields"]


def test_the_laws_of_samplers_and_schedules_are_run_over_the_new_ones(copy: Path) -> None:
    laws = ["tests/numerics/test_samplers.py", "tests/numerics/test_schedule.py"]
    flags = ["-q", "-p", "no:cacheprovider", "-k", "euler_ancestral or quarter_circle"]
    text = answer(copy, "-m", "pytest", *flags, *laws)
    passed = re.search(r"(\d+) passed", text)
    assert passed is not None, text
    assert int(passed.group(1)) >= 8, text
