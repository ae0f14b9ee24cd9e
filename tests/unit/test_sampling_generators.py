"""Laws of the generators but diffusion: models that make images alone, priors of every kind, condition images."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from components.sampling.cascade import Cascade
from components.sampling.requests import Request
from tests.refusals import one_line
from tests.tiny_generators import LONE, PRIORS, conditioned, lone, token_branch


def png(level: int) -> bytes:
    """An image with an edge at `level`."""
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[:, level:] = 255
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return file.getvalue()


def assert_belongs_to_its_request(cascade: Cascade, requests: list[Request]) -> None:
    together, alone = cascade.sample(requests), cascade.sample(requests, batch_size=1)
    assert max(np.abs(a.astype(int) - b).max() for a, b in zip(together, alone, strict=True)) <= 1
    assert (together[0] != together[1]).any(), "another seed gives another image"


@pytest.mark.parametrize("generator", LONE)
def test_a_model_alone_makes_the_same_image_in_whatever_batch(generator: str, tmp_path: Path):
    cascade = Cascade.load(lone(generator, tmp_path))
    assert cascade.generators == (generator,)
    label = None if generator == "vae" else 1
    assert_belongs_to_its_request(cascade, [Request(label=label, seed=seed) for seed in range(3)])


@pytest.mark.parametrize("prior", PRIORS)
def test_every_prior_makes_the_same_image_in_whatever_batch(prior: str, tmp_path: Path):
    cascade = Cascade.load(token_branch(PRIORS[prior], tmp_path))
    assert_belongs_to_its_request(cascade, [Request(label=1, seed=seed, guidance_scale=2.0) for seed in range(3)])


def test_a_condition_image_decides_and_belongs_to_its_request(tmp_path: Path):
    cascade = Cascade.load(conditioned(tmp_path))
    first, second = Request(condition=png(3), seed=1), Request(condition=png(12), seed=1)
    images = cascade.sample([first, second, first])
    assert (images[0] != images[1]).any()
    assert np.array_equal(images[0], images[2])


def test_the_best_of_one_is_the_image_and_the_best_of_more_is_one_of_them(tmp_path: Path):
    cascade = Cascade.load(token_branch(PRIORS["transformer"], tmp_path))
    request = Request(label=1, seed=3)
    assert np.array_equal(cascade.sample([request])[0], cascade.sample([request.replace(best_of=1)])[0])
    best = cascade.sample([request.replace(best_of=4)] * 2)
    assert np.array_equal(best[0], best[1])


def test_a_larger_image_has_the_size_asked_for(tmp_path: Path):
    cascade = Cascade.load(token_branch(PRIORS["transformer"], tmp_path))
    assert cascade.sample([Request(label=1, size=(16, 32))])[0].shape == (16, 32, 3)


KIND, NETWORK, SETTINGS = PRIORS["transformer"]
ROW = (KIND, {name: value for name, value in NETWORK.items() if name not in ("grid", "positions")}, SETTINGS)


@pytest.mark.parametrize(
    ("make", "request_", "words"),
    [
        (lambda p: lone("gan", p), Request(label=1, guidance_scale=2.0), "gan generator takes no guidance_scale"),
        (lambda p: lone("gan", p), Request(label=1, temperature=1.0), "gan generator takes no temperature"),
        (lambda p: lone("vae", p), Request(truncation=0.5), "the vae generator takes no truncation"),
        (lambda p: lone("vae", p), Request(label=1), "takes no label"),
        (lambda p: lone("vae", p), Request(steps=3), "vae generator takes no steps"),
        (lambda p: lone("pixels", p), Request(label=1, generator="tokens"), "no tokens generator; it has pixels"),
        (lambda p: lone("pixels", p), Request(label=1, best_of=2), "the pixels generator takes no best_of"),
        (lambda p: lone("pixels", p), Request(label="fish"), "unknown label 'fish'"),
        (conditioned, Request(), "needs a condition image"),
        (conditioned, Request(condition=b"no image"), "can't be read"),
        (lambda p: lone("gan", p), Request(label=1, condition=b"x"), "the gan generator takes no condition"),
        (lambda p: token_branch(PRIORS["transformer"], p), Request(label=1, size=(18, 16)), "multiples of 4"),
        (lambda p: token_branch(PRIORS["transformer"], p), Request(label=1, size=(8, 32)), "at least"),
        (lambda p: token_branch(PRIORS["masked"], p), Request(label=1, size=(16, 32)), "no larger images"),
        (lambda p: token_branch(ROW, p), Request(label=1, size=(16, 32)), "knows no rows and columns"),
        (lambda p: token_branch(PRIORS["masked"], p), Request(label=1, best_of=2), "causal transformer"),
        (lambda p: token_branch(PRIORS["masked"], p), Request(label=1, steps=17), r"steps must be in \[1, 16\]"),
        (lambda p: token_branch(PRIORS["transformer"], p), Request(label=1, steps=3), "takes no steps"),
    ],
)
def test_what_a_model_can_not_do_is_refused_in_one_line(make, request_: Request, words: str, tmp_path: Path):
    with one_line(ValueError, match=words):
        Cascade.load(make(tmp_path)).sample([request_])
