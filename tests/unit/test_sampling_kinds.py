"""Every kind of generator: an image is its request's in whatever batch, and what is heard of its steps moves no bit."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from components.sampling.cascade import Cascade, compose
from components.sampling.image_files import encode_png
from components.sampling.requests import Request
from tests.tiny_cascade import write_cascade, write_models
from tests.tiny_diffusion_branches import (
    autoguided,
    classifier_guided,
    contrastive,
    dalle2,
    guided_by_the_classifier_alone,
    guided_in_latents,
    imagen,
    latent,
)
from tests.tiny_generators import PRIORS, by_depth, conditioned, depth, lone, token_branch
from tests.tiny_palette import hidden, pixels, write_palette


class ClientLeftError(Exception):
    """What ends a sampling."""


def reranked(folder: Path) -> Path:
    models = write_models(folder)
    return compose(
        folder / "cascade", tokenizer=models["tokenizer"], prior=models["prior"], reranker=contrastive(folder)
    )


def prior(kind: str) -> Callable[[Path], Path]:
    return lambda folder: token_branch(PRIORS[kind], folder)


HIDDEN = hidden().astype(np.uint8) * 255
FILLED = Request(
    image=encode_png(pixels(0)), mask=encode_png(np.repeat(HIDDEN[..., None], 3, axis=2)), task="inpainting"
)
KINDS: dict[str, tuple[Callable[[Path], Path], Request, int]] = {  # folder, request, its steps and tokens
    "base and upsampler": (write_cascade, Request(label=1, guidance_scale=2.0), 4 + 4),
    "two runs of the network a step": (write_cascade, Request(label=1, sampler="heun", steps=3), 3 + 4),
    "depth": (by_depth, Request(label=1, condition=depth(2)), 4),
    "classifier": (classifier_guided, Request(label=1, classifier_scale=3.0), 4),
    "classifier alone": (guided_by_the_classifier_alone, Request(label=1), 4),
    "a weaker model": (autoguided, Request(label=1), 4),
    "latents": (latent, Request(label=1, guidance_scale=2.0), 4),
    "a classifier of latents": (guided_in_latents, Request(label=1, classifier_scale=3.0), 4),
    "text states and upsampler": (imagen, Request(prompt="red", guidance_scale=2.0), 4 + 4),
    "diffusion prior of two candidates": (dalle2, Request(prompt="red"), 2 * 4 + 4),
    "image to image": (write_palette, FILLED, 4),
    "tokens": (prior("transformer"), Request(label=1, guidance_scale=2.0), 16),
    "tokens by class and text": (write_cascade, Request(label=1, generator="tokens", guidance_scale=2.0), 16),
    "masked tokens": (prior("masked"), Request(label=1, guidance_scale=2.0), 4),
    "tokens pixel by pixel": (prior("pixelcnn"), Request(label=1, guidance_scale=2.0), 16),
    "tokens row by row": (prior("row_lstm"), Request(label=1, guidance_scale=2.0), 16),
    "tokens of windows": (prior("transformer"), Request(label=1, size=(16, 32)), 32),
    "tokens after an image": (conditioned, Request(condition=depth(3, 16)), 16),
    "candidates by the prior": (prior("transformer"), Request(label=1, best_of=3), 3 * 16),
    "candidates by a reranker": (reranked, Request(prompt="red apple", best_of=3), 3 * 16),
    "pixels": (lambda folder: lone("pixels", folder), Request(label=1), 4 * 4 * 3),
    "gan": (lambda folder: lone("gan", folder), Request(label=1), 0),
    "vae": (lambda folder: lone("vae", folder), Request(), 0),
}


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Cascade, Request, int]:
    make, asked, steps = KINDS[request.param]
    return Cascade.load(make(tmp_path_factory.mktemp("kind"))), asked, steps


def test_every_generator_makes_the_same_image_in_whatever_batch(kind: tuple[Cascade, Request, int]):
    cascade, request, _ = kind
    requests = [request.replace(seed=seed, label=None if request.label is None else seed % 3) for seed in range(5)]
    requests.append(requests[1].replace(seed=9))
    together = cascade.sample(requests)
    for other in (cascade.sample(requests, batch_size=1), cascade.sample(requests[::-1], batch_size=4)[::-1]):
        assert max(np.abs(a.astype(int) - b).max() for a, b in zip(together, other, strict=True)) <= 1
    assert (together[1] != together[5]).any()


def test_between_is_heard_after_each_step_and_token_can_end_them_and_moves_no_bit(kind: tuple[Cascade, Request, int]):
    (cascade, request, steps), heard = kind, []
    asked = [request, request.replace(seed=1)]
    plain = cascade.sample(asked)
    watched = cascade.sample(asked, between=lambda: heard.append("step"))
    np.testing.assert_array_equal(plain, watched)
    assert len(heard) == 1 + steps  # the batch's own, then of what it is made
    for last in {1, steps // 2 + 1, steps + 1}:
        left = iter(range(last - 1))

        def between(left: object = left) -> None:
            if next(left, None) is None:
                raise ClientLeftError

        with pytest.raises(ClientLeftError):
            cascade.sample(asked, between=between)
    np.testing.assert_array_equal(plain, cascade.sample(asked))  # an ended sampling leaves nothing


def test_between_is_heard_before_each_batch(tmp_path: Path) -> None:
    heard: list[str] = []
    cascade = Cascade.load(lone("gan", tmp_path))
    cascade.sample([Request(label=1, seed=seed) for seed in range(5)], batch_size=2, between=lambda: heard.append("b"))
    assert len(heard) == 3


def test_previews_and_between_are_of_the_same_steps(tmp_path: Path) -> None:
    told: list[object] = []
    Cascade.load(write_cascade(tmp_path)).sample(
        [Request(label=1)],
        on_step=lambda stage, step, time, x_t, x_0: told.append((stage, step, x_0().shape[-1])),
        between=lambda: told.append(None),
    )
    steps = [(stage, step, side) for stage, side in (("base", 8), ("upsampler_16", 16)) for step in range(4)]
    assert told == [None, *(what for step in steps for what in (step, None))]
