"""Any diffusion model of images fills a mask: what is known stays, and the rest is its own."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from components.models.diffusion.steps import SAMPLERS
from components.sampling.cascade import Cascade, compose
from components.sampling.image_files import encode_png
from components.sampling.requests import Request
from pipelines.command.translate import translate
from tests.refusals import one_line
from tests.tiny_cascade import FEW, write_cascade
from tests.tiny_diffusion_branches import base, latent

SIDE = 8
HIDDEN = np.zeros((SIDE, SIDE), bool)
HIDDEN[2:6, 3:] = True
PHOTO = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)


ASKED = Request(seed=3, image=encode_png(PHOTO), mask=encode_png(HIDDEN.astype(np.uint8) * 255))


@pytest.fixture(scope="module")
def cascade(tmp_path_factory: pytest.TempPathFactory) -> Cascade:
    """A base that knows no condition."""
    folder = tmp_path_factory.mktemp("replacement")
    return Cascade.load(compose(folder / "cascade", base=base(folder), sampling={"base": FEW}))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_known_pixels_are_kept_exactly_and_the_others_are_a_matter_of_the_seed(cascade: Cascade, sampler: str) -> None:
    requests = [ASKED.replace(sampler=sampler, seed=seed) for seed in (3, 4)]
    one, two = cascade.sample(requests)
    for image in (one, two):
        np.testing.assert_array_equal(image[~HIDDEN], PHOTO[~HIDDEN])
    assert (one != two)[HIDDEN].any()
    (alone,) = cascade.sample(requests[1:])
    assert np.abs(two.astype(int) - alone).max() <= 1
    (otherwise,) = cascade.sample([requests[0].replace(image=encode_png(255 - PHOTO))])
    assert (one != otherwise)[HIDDEN].any(), "what is known decides what is made"


def test_an_image_that_nothing_is_known_of_is_as_without(cascade: Cascade) -> None:
    everything = ASKED.replace(mask=encode_png(np.full((SIDE, SIDE), 255, np.uint8)))
    plain = Request(seed=3)
    together = cascade.sample([everything, plain, ASKED])
    for image in together[:2]:
        assert np.abs(image.astype(int) - cascade.sample([plain])[0]).max() <= 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"task": "colorization"}, "makes what a mask hides and nothing else"),
        ({"mask": None}, "inpainting needs a mask"),
        ({"image": encode_png(PHOTO[:4])}, "the image has 8x4 pixels, for inpainting this model takes 8x8"),
    ],
)
def test_what_can_not_be_kept_is_one_line(cascade: Cascade, changes: dict, words: str) -> None:
    with one_line(ValueError, match=words):
        cascade.sample([ASKED.replace(**changes)])


@pytest.mark.parametrize("write", [latent, write_cascade])
def test_a_cascade_that_decodes_or_enlarges_keeps_no_pixels(write, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a base of images alone"):
        Cascade.load(write(tmp_path)).sample([ASKED.replace(label=1, generator="diffusion")])


def test_the_command_takes_the_folder_of_a_lone_model(tmp_path: Path) -> None:
    folder = base(tmp_path)
    for name, data in (("photo.png", ASKED.image), ("mask.png", ASKED.mask)):
        (tmp_path / name).write_bytes(data or b"")
    files = {"image": tmp_path / "photo.png", "mask": tmp_path / "mask.png", "out": tmp_path / "out"}
    translate(model=str(folder), **files, task="inpainting", steps=3, seed=3)
    made = np.asarray(Image.open(tmp_path / "out" / "photo-inpainting-0003.png"))
    np.testing.assert_array_equal(made[~HIDDEN], PHOTO[~HIDDEN])
