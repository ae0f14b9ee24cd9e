"""The diffusion branch fills a mask, in pixels, latents and each size: what is known stays, and the rest is its own."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from components.models.diffusion.steps import SAMPLERS
from components.sampling.cascade import Cascade, compose
from components.sampling.generators.diffusion import known_part
from components.sampling.image_files import encode_png
from components.sampling.images import from_uint8
from components.sampling.requests import Request
from pipelines.command.sample import translate
from tests.refusals import one_line
from tests.tiny_cascade import FEW, write_cascade
from tests.tiny_diffusion_branches import LATENT_SCALE, base, latent

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


def enlarged(side: int) -> tuple[Request, np.ndarray, np.ndarray]:
    """A request for the diffusion branch with PHOTO at `side` pixels, that image, and where it is hidden."""
    cells = np.ones((side // SIDE, side // SIDE), np.uint8)
    photo, hidden = np.kron(PHOTO, cells[..., None]), np.kron(HIDDEN, cells) > 0
    mask = encode_png(hidden.astype(np.uint8) * 255)
    return Request(seed=3, label=1, generator="diffusion", image=encode_png(photo), mask=mask), photo, hidden


@pytest.mark.parametrize("write", [latent, write_cascade])
def test_a_cascade_that_decodes_or_enlarges_keeps_pixels_too(write, tmp_path: Path) -> None:
    cascade = Cascade.load(write(tmp_path))
    request, photo, hidden = enlarged(cascade.makers["diffusion"].size[0])
    one, two, otherwise, all_hidden, plain = cascade.sample(
        [
            *(request, request.replace(seed=4), request.replace(image=encode_png(255 - photo))),
            request.replace(mask=encode_png(np.full_like(hidden, 255, np.uint8))),
            request.replace(image=None, mask=None),
        ]
    )
    for image, known in ((one, photo), (two, photo), (otherwise, 255 - photo)):
        np.testing.assert_array_equal(image[~hidden], known[~hidden])
    assert (one != two)[hidden].any()
    assert (one != otherwise)[hidden].any(), "what is known decides what is made"
    assert np.abs(all_hidden.astype(int) - plain).max() <= 1
    with one_line(ValueError, match=f"for inpainting this model takes {len(photo)}x{len(photo)}"):
        cascade.sample([request.replace(image=encode_png(photo[:4]))])


@pytest.mark.parametrize("write", [latent, write_cascade])
def test_every_stage_keeps_what_shows_no_hidden_pixel(write, tmp_path: Path) -> None:
    """One hidden pixel hides its patch of a latent, or its pixel of a smaller image, and nothing else."""
    cascade = Cascade.load(write(tmp_path))
    maker = cascade.makers["diffusion"]
    request, photo, hidden = enlarged(maker.size[0])
    hidden[:] = False
    hidden[5, 2] = True
    plan = cascade.resolve(request.replace(mask=encode_png(hidden.astype(np.uint8) * 255)))
    parts = maker.parts
    base = known_part(parts.base, [plan], parts.autoencoder)
    cell = len(photo) // base.image.shape[-1]
    assert (~base.mask[0, 0]).nonzero().tolist() == [[5 // cell, 2 // cell]]
    whole = from_uint8(photo)[None]
    if parts.autoencoder is not None:
        expected = parts.autoencoder.module.to_latents(whole) * LATENT_SCALE
    else:
        expected = F.avg_pool2d(whole, cell)
    torch.testing.assert_close(base.image, expected)
    for upsampler in parts.upsamplers:
        known = known_part(upsampler, [plan])
        torch.testing.assert_close(known.image, F.avg_pool2d(whole, len(photo) // known.image.shape[-1]))


def test_the_command_takes_the_folder_of_a_lone_model(tmp_path: Path) -> None:
    folder = base(tmp_path)
    for name, data in (("photo.png", ASKED.image), ("mask.png", ASKED.mask)):
        (tmp_path / name).write_bytes(data or b"")
    files = {"image": tmp_path / "photo.png", "mask": tmp_path / "mask.png", "out": tmp_path / "out"}
    translate(model=str(folder), **files, task="inpainting", steps=3, seed=3)
    made = np.asarray(Image.open(tmp_path / "out" / "photo-inpainting-0003.png"))
    np.testing.assert_array_equal(made[~HIDDEN], PHOTO[~HIDDEN])
