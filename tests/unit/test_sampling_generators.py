"""Laws of models that make images alone, of priors of every kind, and of condition images for all generators."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from components.data.images import load_depth
from components.evaluation.gallery import GalleryConfig, gallery_requests
from components.runtime.tracking.registry import input_example
from components.sampling.answers import predictor_of
from components.sampling.cascade import Cascade, ConditionImages
from components.sampling.generators.tokens import sample_prior
from components.sampling.image_files import encode_png, open_image
from components.sampling.images import from_uint8, to_bytes
from components.sampling.requests import Request, RequestRow
from pipelines.command.sample import read_condition
from tests.refusals import one_line
from tests.tiny_cascade import write_cascade
from tests.tiny_generators import PRIORS, by_depth, conditioned, depth, lone, token_branch


@pytest.mark.parametrize(("make", "edges"), [(conditioned, (3, 12)), (by_depth, (2, 5))])
def test_a_condition_image_decides(make, edges: tuple[int, int], tmp_path: Path):
    cascade = Cascade.load(make(tmp_path))
    side = cascade.condition_images.resolution
    images = cascade.sample([Request(condition=depth(edge, side), seed=1) for edge in edges])
    assert (images[0] != images[1]).any()


def test_the_best_of_one_is_the_image_and_a_larger_image_has_the_size_asked_for(tmp_path: Path):
    cascade = Cascade.load(token_branch(PRIORS["transformer"], tmp_path))
    request = Request(label=1, seed=3)
    assert np.array_equal(cascade.sample([request])[0], cascade.sample([request.replace(best_of=1)])[0])
    assert cascade.sample([request.replace(size=(16, 32))])[0].shape == (16, 32, 3)


def test_a_larger_image_is_made_after_the_whole_of_a_condition_image_as_much_larger(tmp_path: Path):
    """Each window is conditioned on its own part (tests/numerics/test_sliding_window.py)."""
    cascade = Cascade.load(conditioned(tmp_path))
    upper, lower = (np.asarray(Image.open(io.BytesIO(depth(edge, 16)))) for edge in (3, 12))
    tall = np.concatenate([upper, lower])
    requests = [Request(condition=encode_png(image), seed=1, size=(32, 16)) for image in (tall, tall[::-1])]
    one, other = cascade.sample(requests)
    assert (one != other).any()
    maker, plan = cascade.makers["tokens"], cascade.resolve(requests[0])
    tokens = maker.parts.condition.module.tokenize(from_uint8(tall)[None]).flatten(1)
    expected = maker.tokenizer.module.detokenize(sample_prior(maker.first, [plan], tokens, grid=(8, 4)))
    assert tokens.shape == (1, 32)
    assert np.array_equal(one, to_bytes(expected)[0])


KIND, NETWORK, SETTINGS = PRIORS["transformer"]
ROW = (KIND, {name: value for name, value in NETWORK.items() if name not in ("grid", "positions")}, SETTINGS)


@pytest.mark.parametrize(
    ("make", "request_", "words"),
    [
        (lambda p: lone("gan", p), Request(label=1, guidance_scale=2.0), "gan generator takes no guidance_scale"),
        (lambda p: lone("vae", p), Request(truncation=0.5), "the vae generator takes no truncation"),
        (lambda p: lone("vae", p), Request(label=1), "takes no label"),
        (lambda p: lone("pixels", p), Request(label=1, generator="tokens"), "no tokens generator; it has pixels"),
        (lambda p: lone("pixels", p), Request(label="fish"), "unknown label 'fish'"),
        (conditioned, Request(), "needs a condition image"),
        (by_depth, Request(label=1), "needs a condition image, and none is given"),
        (write_cascade, Request(label=1, condition=depth(2)), "takes no condition image"),
        (conditioned, Request(condition=b"no image"), "can't be read"),
        (lambda p: token_branch(PRIORS["transformer"], p), Request(label=1, size=(18, 16)), "multiples of 4"),
        (lambda p: token_branch(PRIORS["transformer"], p), Request(label=1, size=(8, 32)), "at least"),
        (lambda p: token_branch(PRIORS["masked"], p), Request(label=1, size=(16, 32)), "no larger images"),
        (lambda p: token_branch(ROW, p), Request(label=1, size=(16, 32)), "knows no rows and columns"),
        (lambda p: token_branch(PRIORS["masked"], p), Request(label=1, best_of=2), "causal transformer"),
    ],
)
def test_what_a_model_can_not_do_is_refused_in_one_line(make, request_: Request, words: str, tmp_path: Path):
    with one_line(ValueError, match=words):
        Cascade.load(make(tmp_path)).sample([request_])


SIZE = 8  # of a diffusion model by depth


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return by_depth(tmp_path_factory.mktemp("depth"))


@pytest.fixture(scope="module")
def cascade(folder: Path) -> Cascade:
    return Cascade.load(folder)


def test_guidance_goes_away_from_no_image_and_a_image_needs_no_label(cascade: Cascade) -> None:
    request = Request(condition=depth(4), seed=1)
    plain, guided = cascade.sample([request, request.replace(guidance_scale=4.0)])
    assert (plain != guided).any()


def test_a_depth_map_on_disk_becomes_the_image_of_training(cascade: Cascade, tmp_path: Path) -> None:
    assert cascade.condition_images == ConditionImages(SIZE, "depth")
    raw = np.linspace(1000, 9000, 256).reshape(16, 16).astype(np.uint16)
    Image.fromarray(raw).save(tmp_path / "depth.png")
    expected = load_depth((tmp_path / "depth.png").read_bytes(), resolution=SIZE)
    assert read_condition(tmp_path / "depth.png", cascade.condition_images) == encode_png(expected)
    (tmp_path / "map.png").write_bytes(encode_png(np.array([[0, 1], [2, 0]], np.uint8)))
    given = read_condition(tmp_path / "map.png", ConditionImages(2, "mask", classes=3))
    assert np.asarray(open_image(given))[..., 0].tolist() == [[0, 128], [255, 0]]


def test_the_gallery_shows_what_was_made_of_condition_images(cascade: Cascade) -> None:
    shown = gallery_requests(GalleryConfig(), cascade, captions=(), images=[depth(2), depth(4)], seed=0)
    assert {request.condition for request in shown["diffusion_by_condition"]} == {depth(2), depth(4)}


def test_a_registered_model_takes_its_example(folder: Path) -> None:
    for model in (folder, folder / "base"):
        assert predictor_of(model)([RequestRow(**row) for row in input_example(model)])
