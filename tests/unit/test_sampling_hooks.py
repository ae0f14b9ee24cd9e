"""`between`: heard between the steps and tokens of every kind of generator, may end it, and moves no bit."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from components.sampling.cascade import Cascade, compose
from components.sampling.requests import Request
from tests.tiny_cascade import write_cascade, write_models
from tests.tiny_diffusion_branches import contrastive, dalle2, imagen, latent
from tests.tiny_generators import PRIORS, conditioned, lone, token_branch
from tests.unit.test_sampling_generators import png as edge
from tests.unit.test_sampling_translate import hidden, pixels, png, write_palette


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
FILLED = Request(image=png(pixels(0)), mask=png(np.repeat(HIDDEN[..., None], 3, axis=2)), task="inpainting")
KINDS: dict[str, tuple[Callable[[Path], Path], Request, int]] = {  # folder, request, its steps and tokens
    "base and upsampler": (write_cascade, Request(label=1), 4 + 4),
    "two runs of the network a step": (write_cascade, Request(label=1, sampler="heun", steps=3), 3 + 4),
    "latents": (latent, Request(label=1), 4),
    "text states and upsampler": (imagen, Request(prompt="red"), 4 + 4),
    "diffusion prior of two candidates": (dalle2, Request(prompt="red"), 2 * 4 + 4),
    "image to image": (write_palette, FILLED, 4),
    "tokens": (prior("transformer"), Request(label=1, guidance_scale=2.0), 16),
    "masked tokens": (prior("masked"), Request(label=1), 4),
    "tokens pixel by pixel": (prior("pixelcnn"), Request(label=1), 16),
    "tokens row by row": (prior("row_lstm"), Request(label=1), 16),
    "tokens of windows": (prior("transformer"), Request(label=1, size=(16, 32)), 32),
    "tokens after an image": (conditioned, Request(condition=edge(3)), 16),
    "candidates by the prior": (prior("transformer"), Request(label=1, best_of=3), 3 * 16),
    "candidates by a reranker": (reranked, Request(prompt="red apple", best_of=3), 3 * 16),
    "pixels": (lambda folder: lone("pixels", folder), Request(label=1), 4 * 4 * 3),
    "gan": (lambda folder: lone("gan", folder), Request(label=1), 0),
    "vae": (lambda folder: lone("vae", folder), Request(), 0),
}


@pytest.mark.parametrize("kind", KINDS)
def test_between_is_heard_after_each_step_and_token_can_end_them_and_moves_no_bit(kind: str, tmp_path: Path) -> None:
    make, request, steps = KINDS[kind]
    cascade, heard = Cascade.load(make(tmp_path)), []
    asked = [request, request.replace(seed=1)]
    plain = cascade.sample(asked)
    watched = cascade.sample(asked, between=lambda: heard.append("step"))
    np.testing.assert_array_equal(plain, watched)
    assert len(heard) == 1 + steps  # the batch's own, then of what it is made
    for last in {1, steps // 2 + 1, steps + 1}:
        left = iter(range(last - 1))

        def between(left: object = left) -> None:
            if next(left, None) is None:
                raise ClientLeftError(kind)

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
        on_step=lambda stage, step, time, x_t, x_0: told.append((stage, step, x_0.shape[-1])),
        between=lambda: told.append(None),
    )
    steps = [(stage, step, side) for stage, side in (("base", 8), ("upsampler_16", 16)) for step in range(4)]
    assert told == [None, *(what for step in steps for what in (step, None))]
