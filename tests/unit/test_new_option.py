"""A new sampling option is a field, a new generator a class in a table: everything else takes them from there."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from components.evaluation.gallery import GalleryConfig, gallery_requests
from components.evaluation.report import described_image
from components.runtime.tracking.registry import input_example
from components.sampling.answers import predictor_of
from components.sampling.cascade import GENERATORS, Cascade, compose
from components.sampling.generator import Generator, Hooks, Parts
from components.sampling.model import SamplingModel
from components.sampling.plan import Plan
from components.sampling.requests import Request, RequestRow
from pipelines.command.sample import sample
from tests.tiny_cascade import write_cascade
from tests.tiny_generators import LONE, write

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


class Flat(Generator):
    """One gray level a class."""

    name, title = "flat", "Flat"
    options = ("truncation",)

    @classmethod
    def first_of(cls, parts: Parts) -> SamplingModel | None:
        return parts.model if parts.model is not None and parts.model.settings.get("flat") else None

    def make(self, plans: Sequence[Plan], hooks: Hooks) -> dict[str, Tensor]:
        strength = plans[0].of(self.first).truncation or 1.0
        levels = [((plan.label or 0) - 1) * strength for plan in plans]
        return {self.first.name: torch.tensor(levels)[:, None, None, None].expand(-1, 3, 8, 8)}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cascade of its model alone."""
    monkeypatch.setitem(GENERATORS, Flat.name, Flat)
    monkeypatch.delitem(GENERATORS, "gan")
    kind, network, settings = LONE["gan"]
    return compose(tmp_path / "cascade", model=write(tmp_path / "model", kind, network, settings | {"flat": True}))


def test_a_new_generator_samples_and_its_options_are_checked(folder: Path):
    cascade = Cascade.load(folder)
    assert cascade.generators == ("flat",)
    made = cascade.sample([Request(label=0), Request(label=2), Request(label=2, truncation=0.5)])
    assert [int(image.mean()) for image in made] == [0, 255, 191]
    with pytest.raises(ValueError, match="the flat generator takes no steps"):
        cascade.resolve(Request(label=0, steps=3))


def test_the_command_samples_by_it(folder: Path, tmp_path: Path):
    sample(str(folder), label=["2"], count=1, generator="flat", out=tmp_path / "out")
    assert np.asarray(Image.open(next((tmp_path / "out").glob("*-flat-0000.png")))).min() == 255


def test_a_registered_model_takes_its_example(folder: Path):
    (example,) = input_example(folder) or []
    assert example["generator"] == "flat"
    (answer,) = predictor_of(folder)([RequestRow(**example)])
    assert answer.startswith("iVBOR")  # a PNG in base64


def test_the_report_shows_its_images(folder: Path):
    shown = gallery_requests(GalleryConfig(num_prompts=0), Cascade.load(folder), captions=(), seed=0)
    assert {*shown} == {"flat_by_class"}
    assert described_image("flat_by_class")[:2] == ("samples", "Flat, by class")
