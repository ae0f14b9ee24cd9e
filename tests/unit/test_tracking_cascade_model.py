"""A registered model of every kind takes the row that its signature shows, alone and composed."""

import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from components.runtime.tracking.registry import REQUIREMENTS, input_example, pip_requirements
from components.sampling.answers import example_of, predictor_of
from components.sampling.cascade import Cascade
from components.sampling.frozen_text import load_frozen_text
from components.sampling.generators.diffusion import class_log_probabilities
from components.sampling.images import read_image
from components.sampling.model import load_model
from components.sampling.requests import Request, RequestRow
from tests import tiny_palette
from tests.image_sets import png
from tests.refusals import one_line
from tests.tiny_cascade import CLASSES, DIFFUSION, write_cascade, write_model
from tests.tiny_diffusion_branches import DIT, GENERATORS, base, classifier, contrastive
from tests.tiny_generators import LONE, PRIORS, conditioned, lone, token_branch
from tests.unit.test_frozen_text import pretrained_folder


def predict(folder: Path) -> str:
    """What the model in `folder` answers to its own example."""
    (answer,) = predictor_of(folder)([RequestRow(**row) for row in input_example(folder)])
    return answer


def pixels(answer: str) -> np.ndarray:
    with Image.open(io.BytesIO(base64.b64decode(answer))) as image:
        return np.asarray(image)


@pytest.mark.parametrize("generator", LONE)
def test_a_model_alone_paints_the_same_as_composed(generator: str, tmp_path: Path):
    folder = lone(generator, tmp_path)
    assert np.array_equal(pixels(predict(folder / "model")), pixels(predict(folder)))


def test_a_model_that_works_on_images_does_alone_as_composed(tmp_path: Path):
    folder = tiny_palette.write_palette(tmp_path)
    (example,) = input_example(folder)
    row = RequestRow(**example | {"steps": 4, "sampler": "ddpm"})
    alone, composed = (pixels(predictor_of(place)([row])[0]) for place in (folder / "model", folder))
    assert np.array_equal(alone, composed)


@pytest.mark.parametrize("prior", PRIORS)
def test_a_prior_alone_answers_tokens_and_composed_a_image(prior: str, tmp_path: Path):
    folder = token_branch(PRIORS[prior], tmp_path)
    tokens = np.array(json.loads(predict(folder / "prior")))
    assert tokens.shape == (4, 4)
    assert pixels(predict(folder)).shape == (16, 16, 3)


def test_a_conditioned_prior_takes_tokens_alone_and_a_image_composed(tmp_path: Path):
    folder = conditioned(tmp_path)
    assert np.array(json.loads(predict(folder / "prior"))).shape == (4, 4)
    assert pixels(predict(folder)).shape == (16, 16, 3)


def test_the_whole_cascade_and_each_of_its_models_take_their_rows(tmp_path: Path):
    folder = write_cascade(tmp_path)
    assert pixels(predict(folder)).shape == (16, 16, 3)
    for part in ("tokenizer", "prior", "base", "upsampler_16"):
        assert predict(folder / part)


def test_a_row_with_a_generator_left_out_takes_the_first_one(tmp_path: Path):
    folder = token_branch(PRIORS["transformer"], tmp_path)
    (answer,) = predictor_of(folder)([RequestRow(label="1", seed=5, best_of=2)])
    (expected,) = Cascade.load(folder).sample([Request(label=1, seed=5, best_of=2)])
    assert np.array_equal(pixels(answer), expected)


def image(seed: int = 0) -> bytes:
    return png(tiny_palette.pixels(seed, side=12))


def text(data: bytes) -> str:
    return base64.b64encode(data).decode()


@pytest.mark.parametrize("generator", GENERATORS)
def test_a_cascade_of_several_networks_takes_its_row(generator: str, tmp_path: Path):
    folder = GENERATORS[generator](tmp_path)
    (row,) = input_example(folder) or []
    assert (row.get("classifier_scale") is not None) == (folder / "classifier").is_dir()
    side = 16 if generator in ("latent", "guided_in_latents", "imagen") else 8
    assert pixels(predict(folder)).shape == (side, side, 3)
    for part in (path for path in folder.iterdir() if path.is_dir()):
        if input_example(part) is not None:
            assert predict(part)


@pytest.mark.parametrize(
    ("generator", "part"),
    [
        ("latent", "base"),
        ("imagen", "base"),
        ("imagen", "upsampler_16"),
        *[("dalle2", p) for p in ("base", "diffusion_prior")],
    ],
)
def test_a_model_that_does_nothing_alone_says_what_to_load(generator: str, part: str, tmp_path: Path):
    folder = GENERATORS[generator](tmp_path) / part
    assert input_example(folder) is None
    answer = predictor_of(folder)
    with one_line(ValueError, match=f"{part} needs the networks .*: load the composed cascade"):
        answer([RequestRow(prompt="red", label="0", image=text(image()))])


def test_a_contrastive_model_answers_embeddings_of_texts_and_of_images(tmp_path: Path):
    folder = contrastive(tmp_path)
    predict = predictor_of(folder)
    rows = [
        RequestRow(prompt="red apple"),
        RequestRow(prompt="grey cat"),
        RequestRow(image=text(image(0))),
        RequestRow(image=text(image(1))),
    ]
    embeddings = np.array([json.loads(answer) for answer in predict(rows)])
    assert embeddings.shape == (4, 6)
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, rtol=1e-5)
    assert len(np.unique(embeddings.round(4), axis=0)) == 4
    wanted = load_frozen_text(folder).conditions(["red apple"])["text_embedding"][0]
    np.testing.assert_allclose(embeddings[0] * 6**0.5, wanted.numpy(), rtol=1e-5)
    for row in (RequestRow(), RequestRow(prompt="red", image=text(image()))):
        with pytest.raises(ValueError, match="either a prompt or an image"):
            predict([row])
    with pytest.raises(ValueError, match="the prompt is too long"):
        predict([RequestRow(prompt="red apple " * 20)])


def test_a_classifier_answers_the_probability_of_each_class(tmp_path: Path):
    folder = classifier(tmp_path)
    answers = [
        json.loads(answer) for answer in predictor_of(folder)([RequestRow(image=text(image(seed))) for seed in (0, 1)])
    ]
    assert answers[0] != answers[1]
    for seed, answer in enumerate(answers):
        read = read_image(image(seed), resolution=8)[None]
        wanted = class_log_probabilities(load_model("classifier", folder), read)[0].exp()
        assert list(answer) == CLASSES
        torch.testing.assert_close(torch.tensor(list(answer.values())), wanted)
        assert sum(answer.values()) == pytest.approx(1)
    with pytest.raises(ValueError, match="needs an image"):
        predictor_of(folder)([RequestRow()])


def test_a_pretrained_text_encoder_answers_states_and_needs_its_library(tmp_path: Path):
    folder = pretrained_folder(tmp_path / "text_encoder", "bert")
    assert np.array(json.loads(predict(folder))).shape == (5, 8)
    for row, said in ((RequestRow(), "needs a prompt"), (RequestRow(prompt="a b c d e f"), "too long: 6 tokens")):
        with pytest.raises(ValueError, match=said):
            predictor_of(folder)([row])
    for model in (folder, tmp_path):  # alone, and as a part
        names = {requirement.partition("==")[0] for requirement in pip_requirements(model)}
        assert names == {*REQUIREMENTS, "transformers"}
    assert len(pip_requirements(contrastive(tmp_path / "other"))) == len(REQUIREMENTS)


def test_a_diffusion_transformer_and_a_base_with_a_condition_image_take_their_rows(tmp_path: Path):
    settings = DIFFUSION | {"role": "base", "resolution": 8}
    dit = write_model(tmp_path / "base", "dit", DIT | {"resolution": 8}, settings)
    assert pixels(predict(dit)).shape == (8, 8, 3)
    seen = base(tmp_path / "seen", condition_image_channels=3, settings={"condition_member": "depth"})
    assert pixels(predict(seen)).shape == (8, 8, 3)


@pytest.mark.parametrize(
    ("part", "row", "said"),
    [
        ("prior", {"best_of": 8}, "best_of is not for the model of stage transformer alone"),
        ("prior", {"task": "inpainting"}, "task is not"),
        ("prior", {"generator": "diffusion"}, "generator is not"),
        ("prior", {"sampling": '{"piror": {"top_k": 1}}'}, "sampling piror.top_k: the only stage here is transformer"),
        ("prior", {"top_p": 1e-300}, "top_p must be of a size"),
        ("prior", {"classifier_scale": 9.0}, "classifier_scale is not"),
        ("prior", {"image": "aGVsbG8="}, "image is not"),
        ("prior", {"condition": "notjson"}, "condition must be tokens of a prior alone"),
        ("tokenizer", {"steps": 3}, "steps is not"),
        ("tokenizer", {"prompt": "red"}, "prompt is not"),
        ("tokenizer", {"label": "1"}, "label is not"),
    ],
)
def test_a_field_that_a_model_alone_can_not_have_is_refused(part: str, row: dict, said: str, tmp_path: Path) -> None:
    folder = write_cascade(tmp_path) / part
    example = example_of(folder)
    assert example is not None
    with pytest.raises(ValueError, match=said):
        predictor_of(folder)([example.model_copy(update=row)])


def test_a_row_names_a_sampler_and_how_much_a_classifier_pulls(tmp_path: Path):
    folder = GENERATORS["classifier_guided"](tmp_path)
    rows = [
        RequestRow(label="1", seed=3),
        RequestRow(label="1", seed=3, sampler="ddim"),
        RequestRow(label="1", seed=3, classifier_scale=9),
    ]
    asked = [Request(label=1, seed=3), Request(label=1, seed=3, sampler="ddim")]
    asked.append(Request(label=1, seed=3, classifier_scale=9.0))
    made = [pixels(answer) for answer in predictor_of(folder)(rows)]
    for ours, theirs in zip(Cascade.load(folder).sample(asked), made, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert (made[0] != made[1]).any()
    assert (made[0] != made[2]).any()
