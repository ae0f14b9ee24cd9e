"""A new sampling option is a field in one file: the command, the API, rows, PNGs, the page and sampling take it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny_cascade import write_cascade

FIELD = """
    eta: Annotated[
        float | None,
        Option(title="Noise", help="New noise of each step.", generators=("diffusion",), setting="eta", ge=0, le=1),
    ] = None
    size: Annotated[
"""
TELL = """
import json, sys
from typer.testing import CliRunner
from components.sampling.cascade import Cascade
from components.sampling.requests import RequestRow, request_of, settings_of
from components.sampling.requests import Request
from components.serving.api_models import EditForm, Generation
from components.serving.app import fields_module
from pipelines.command.cli import app

cascade, request = Cascade.load(sys.argv[1]), Request(label=1, seed=3, sampler="ddim", eta=0.5)
long = request.replace(eta=None, sampling={"base": {"eta": 0.5}})
plain, noisy, same = cascade.sample([long.replace(sampling=()), request, long])
settings = settings_of(request, model="m", version=None)
print(json.dumps({
    "help": CliRunner().invoke(app, ["sample", "--help"], env={"COLUMNS": "200"}).output,
    "schemas": [model.model_json_schema()["properties"].get("eta") for model in (Generation, EditForm)],
    "column": str(RequestRow.model_fields["eta"].annotation),
    "row again": RequestRow.of(request).request() == request.replace(label="1"),
    "PNG": settings,
    "PNG again": request_of(settings) == request,
    "page": fields_module(),
    "generators": {name: "eta" in maker.options for name, maker in cascade.makers.items()},
    "sampled": [bool((noisy != plain).any()), bool((noisy == same).all())],
}))
"""


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What a copy of the project with one more field says of it."""
    folder = tmp_path_factory.mktemp("copy")
    for room in ("components", "pipelines"):
        shutil.copytree(Path(__file__).parents[2] / room, folder / room, ignore=shutil.ignore_patterns("__pycache__"))
    file = folder / "components/sampling/requests.py"
    before = file.read_text()
    assert before.count(FIELD.splitlines()[-1]) == 1
    file.write_text(before.replace(FIELD.splitlines()[-1], FIELD.strip("\n"), 1))
    command = [sys.executable, "-c", TELL, str(write_cascade(folder / "model"))]
    done = subprocess.run(command, cwd=folder, env={**os.environ, "PYTHONPATH": str(folder)}, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    return json.loads(done.stdout.splitlines()[-1])


def test_the_command_and_the_api_take_it(told: dict) -> None:
    (line,) = (line for line in told["help"].splitlines() if "--eta" in line)
    assert "New noise of each step." in line
    for schema in told["schemas"]:
        assert schema["anyOf"][0] == {"type": "number", "minimum": 0, "maximum": 1}
        assert schema["description"] == "New noise of each step."


def test_a_registered_model_and_a_png_take_it(told: dict) -> None:
    assert told["column"] == "float | None"
    assert told["PNG"] == {"model": "m", "label": 1, "seed": 3, "sampler": "ddim", "eta": 0.5}
    assert told["row again"]
    assert told["PNG again"]


def test_the_page_has_a_control_of_it(told: dict) -> None:
    form = json.loads(told["page"].splitlines()[0].partition(" = ")[2].removesuffix(";"))
    assert form["eta"] == {"text": "Noise", "setting": "eta", "kind": "number", "min": 0, "max": 1}


def test_its_generators_sample_by_it(told: dict) -> None:
    assert told["generators"] == {"diffusion": True, "tokens": False}
    assert told["sampled"] == [True, True]
