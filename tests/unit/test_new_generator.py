"""A new kind of generator is a class and a line in a table: everything else takes it from there."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from components.evaluation.gallery import GalleryConfig, gallery_requests
from components.evaluation.report import image_groups
from components.runtime.tracking.registry import input_example
from components.sampling.answers import predictor_of
from components.sampling.cascade import GENERATORS, Cascade, compose
from components.sampling.generator import Generator, Hooks, Parts
from components.sampling.model import SamplingModel
from components.sampling.plan import Plan
from components.sampling.requests import Request, RequestRow
from pipelines.command.sample import sample
from tests.tiny_generators import LONE, write


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
    assert image_groups()["samples"]["flat_by_class"][0] == "Flat, by class"
