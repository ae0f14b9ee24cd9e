"""A contrastive encoder in a cascade chooses among the images of a prompt."""

from pathlib import Path

import numpy as np
import pytest
import torch

from components.configuration.usage import UsageError
from components.models.diffusion.corruption import downsample, quantize_8_bit
from components.sampling.cascade import Cascade, compose
from components.sampling.images import from_uint8
from components.sampling.requests import Request
from pipelines.recipes.catalog import load_recipe
from pipelines.workflows import build_workflow
from tests.refusals import one_line
from tests.tiny_cascade import write_models
from tests.tiny_diffusion_branches import contrastive

ASKED = [Request(prompt=prompt, seed=seed, generator="tokens") for seed, prompt in enumerate(("red apple", "grey cat"))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokens of 16² images by label and prompt; the encoder sees 8²."""
    place = tmp_path_factory.mktemp("reranked")
    models = write_models(place)
    parts = {name: models[name] for name in ("tokenizer", "prior")}
    sampling = {"reranker": {"candidates": 3}}
    return compose(place / "cascade", **parts, reranker=contrastive(place), sampling=sampling)


@torch.no_grad()
def likeness(cascade: Cascade, image: np.ndarray, prompt: str) -> float:
    encoder, text = cascade.reranker.module, cascade.reranker.text
    seen = encoder.encode_image(quantize_8_bit(downsample(from_uint8(image[None]), 8)))
    return float((seen * encoder.encode_text(text.encode([prompt])).embedding).sum())


def test_more_candidates_are_never_further_from_the_prompt(folder: Path) -> None:
    """What is chosen of a few is among the many."""
    cascade = Cascade.load(folder)
    found = {n: cascade.sample([r.replace(best_of=n) for r in ASKED]) for n in (1, 2, 4, 8)}
    near = [[likeness(cascade, found[n][row], str(r.prompt)) for n in found] for row, r in enumerate(ASKED)]
    assert near == [sorted(each) for each in near]
    assert any(each[-1] > each[0] for each in near)


def test_the_cascade_says_how_many_where_a_request_does_not(folder: Path) -> None:
    cascade = Cascade.load(folder)
    three = cascade.sample([request.replace(best_of=3) for request in ASKED])
    by_setting = cascade.sample([r.replace(sampling=(("reranker", "candidates", 3),)) for r in ASKED])
    for images in (cascade.sample(ASKED), by_setting, cascade.sample(ASKED, batch_size=1)):
        assert np.abs(np.stack(images).astype(int) - np.stack(three)).max() <= 1


def test_one_candidate_is_the_image_without_a_reranker_and_so_is_that_without_a_prompt(folder: Path) -> None:
    cascade = Cascade.load(folder)
    plain = Cascade(tokenizer=cascade.tokenizer, prior=cascade.prior)
    one = [request.replace(best_of=1) for request in ASKED]
    np.testing.assert_array_equal(cascade.sample(one), plain.sample(ASKED))
    by_label = [Request(label=1, seed=3, generator="tokens")]
    np.testing.assert_array_equal(cascade.sample(by_label), plain.sample(by_label))
    assert [cascade.makers["tokens"].resolve(each).candidates for each in (*by_label, ASKED[0])] == [1, 3]


def test_what_can_not_be_ranked_is_one_line(folder: Path) -> None:
    with one_line(ValueError, match="best_of needs a prompt"):
        Cascade.load(folder).sample([Request(label=1, best_of=2, generator="tokens")])


def test_dalle_is_ranked_by_the_encoder_that_dalle_2_has() -> None:
    workflows = [build_workflow(load_recipe(name, [])) for name in ("dalle", "dalle2")]
    assert len({repr(workflow.by_name["contrastive"].config) for workflow in workflows}) == 1
    for name in ("dalle", "scenes"):
        assert build_workflow(load_recipe(name, [])).before("contrastive") == {"images"}
        assert "contrastive" in build_workflow(load_recipe(name, [])).before("cascade")


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("reranker=null", "sampling.reranker is given, reranker is missing"),
        ("reranker.resolution=128", "reranker.resolution must be at most tokenizer.resolution 64"),
        ("sampling.reranker.candidates=0", "sampling.reranker.candidates"),
    ],
)
@pytest.mark.parametrize("recipe", ["dalle", "scenes"])
def test_a_reranker_that_does_not_fit_is_refused(recipe: str, assignment: str, words: str) -> None:
    with one_line(UsageError, match=words):
        load_recipe(recipe, [assignment])
