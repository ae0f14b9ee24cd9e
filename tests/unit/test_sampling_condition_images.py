"""Laws of a diffusion model that is conditioned on another image, such as a depth map."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from components.data.images import load_depth
from components.evaluation.gallery import GalleryConfig, gallery_requests
from components.runtime.tracking.registry import input_example
from components.sampling.answers import predictor_of
from components.sampling.cascade import Cascade, ConditionImages, compose
from components.sampling.image_files import encode_png
from components.sampling.requests import Request, RequestRow
from pipelines.command.sample import read_condition
from tests.tiny_cascade import DIFFUSION, FEW, UNET, write_model, write_models

SIZE = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("depth")
    network = UNET | {"resolution": SIZE, "text": None, "condition_image_channels": 3}
    settings = DIFFUSION | {"role": "base", "resolution": SIZE, "condition_member": "depth"}
    base = write_model(folder / "depth", "unet", network, settings)
    return compose(folder / "cascade", base=base, sampling={"base": FEW})


@pytest.fixture(scope="module")
def cascade(folder: Path) -> Cascade:
    return Cascade.load(folder)


def depth(edge: int) -> bytes:
    pixels = np.zeros((SIZE, SIZE, 3), np.uint8)
    pixels[:, edge:] = 200
    return encode_png(pixels)


def test_the_image_decides_and_belongs_to_its_request(cascade: Cascade) -> None:
    requests = [Request(label=1, condition=depth(edge), seed=3) for edge in (2, 5)]
    together, alone = cascade.sample(requests), cascade.sample(requests, batch_size=1)
    assert (together[0] != together[1]).any()
    assert max(np.abs(a.astype(int) - b).max() for a, b in zip(together, alone, strict=True)) <= 1


def test_guidance_goes_away_from_no_image_and_a_image_needs_no_label(cascade: Cascade) -> None:
    request = Request(condition=depth(4), seed=1)
    plain, guided = cascade.sample([request, request.replace(guidance_scale=4.0)])
    assert (plain != guided).any()


def test_a_missing_image_and_one_that_is_not_taken_are_refused(cascade: Cascade, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs a condition image, and none is given"):
        cascade.sample([Request(label=1)])
    plain = Cascade.load(compose(tmp_path / "plain", base=write_models(tmp_path)["base"]))
    assert plain.condition_images is None
    with pytest.raises(ValueError, match="takes no condition image"):
        plain.sample([Request(label=1, condition=depth(2))])


def test_a_depth_map_on_disk_becomes_the_image_of_training(cascade: Cascade, tmp_path: Path) -> None:
    assert cascade.condition_images == ConditionImages(SIZE, "depth")
    raw = np.linspace(1000, 9000, 256).reshape(16, 16).astype(np.uint16)
    Image.fromarray(raw).save(tmp_path / "depth.png")
    expected = load_depth((tmp_path / "depth.png").read_bytes(), resolution=SIZE)
    assert read_condition(tmp_path / "depth.png", cascade.condition_images) == encode_png(expected)


def test_the_gallery_shows_what_was_made_of_condition_images(cascade: Cascade) -> None:
    shown = gallery_requests(GalleryConfig(), cascade, captions=(), images=[depth(2), depth(4)], seed=0)
    assert {request.condition for request in shown["diffusion_by_condition"]} == {depth(2), depth(4)}


def test_a_registered_model_takes_its_example(folder: Path) -> None:
    for model in (folder, folder / "base"):
        assert predictor_of(model)([RequestRow(**row) for row in input_example(model)])
