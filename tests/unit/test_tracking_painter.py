"""A registered model of every kind takes the row that its signature shows, alone and composed."""

import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from components.sampling.cascade import Cascade
from components.sampling.requests import Request
from components.tracking.painter import Row, painter_of
from components.tracking.registry import _input_example
from tests.tiny_cascade import write_cascade
from tests.tiny_roads import LONE, PRIORS, conditioned, lone, token_road


def paint(folder: Path) -> str:
    """What the model in `folder` answers to its own example."""
    (answer,) = painter_of(folder)([Row(**row) for row in _input_example(folder)])
    return answer


def pixels(answer: str) -> np.ndarray:
    with Image.open(io.BytesIO(base64.b64decode(answer))) as image:
        return np.asarray(image)


@pytest.mark.parametrize("road", LONE)
def test_a_model_alone_paints_the_same_as_composed(road: str, tmp_path: Path):
    folder = lone(road, tmp_path)
    assert np.array_equal(pixels(paint(folder / "model")), pixels(paint(folder)))


@pytest.mark.parametrize("prior", PRIORS)
def test_a_prior_alone_answers_tokens_and_composed_a_picture(prior: str, tmp_path: Path):
    folder = token_road(PRIORS[prior], tmp_path)
    tokens = np.array(json.loads(paint(folder / "prior")))
    assert tokens.shape == (4, 4)
    assert pixels(paint(folder)).shape == (16, 16, 3)


def test_a_conditioned_prior_takes_tokens_alone_and_a_picture_composed(tmp_path: Path):
    folder = conditioned(tmp_path)
    assert np.array(json.loads(paint(folder / "prior"))).shape == (4, 4)
    assert pixels(paint(folder)).shape == (16, 16, 3)


def test_the_whole_cascade_and_each_of_its_models_take_their_rows(tmp_path: Path):
    folder = write_cascade(tmp_path)
    assert pixels(paint(folder)).shape == (16, 16, 3)
    for part in ("tokenizer", "prior", "base", "upsampler_16"):
        assert paint(folder / part)


def test_a_row_with_a_road_left_out_takes_the_first_one(tmp_path: Path):
    folder = token_road(PRIORS["transformer"], tmp_path)
    (answer,) = painter_of(folder)([Row(label="1", seed=5, best_of=2)])
    (expected,) = Cascade.load(folder).sample([Request(label=1, seed=5, best_of=2)])
    assert np.array_equal(pixels(answer), expected)
