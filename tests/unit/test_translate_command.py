"""`cascade translate`: files in, files out, and one line with exit code 2 for what can't be done."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from components.configuration.usage import UsageError
from components.sampling.image_files import gray_png
from components.sampling.requests import Request, read_settings, settings_of, with_settings
from pipelines.command.translate import translate
from tests.in_process import in_process
from tests.tiny_cascade import write_cascade
from tests.unit.test_sampling_translate import hidden, pixels, write_palette


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, an image and a mask, on disk."""
    folder = tmp_path_factory.mktemp("translate")
    write_palette(folder)
    Image.fromarray(pixels(0)).save(folder / "photo.png")
    Image.fromarray(hidden().astype(np.uint8) * 255).save(folder / "mask.png")
    Image.fromarray(pixels(0, 12)).save(folder / "small.png")
    (folder / "text.png").write_text("no image")
    return folder


def translated(folder: Path, **changes: object) -> Path:
    files = {"image": folder / "photo.png", "mask": folder / "mask.png", "out": folder / "out"}
    asked = files | {"model": str(folder / "cascade"), "task": "inpainting", "seed": 0, "count": 2} | changes
    translate(**asked)
    return asked["out"] / "before_after.png"


def test_images_of_the_seeds_and_one_of_before_and_after_are_written(folder: Path) -> None:
    shown = translated(folder, seed=5)
    made = [np.asarray(Image.open(folder / "out" / f"photo-inpainting-{seed:04d}.png")) for seed in (5, 6)]
    assert (made[0] != made[1]).any()
    for image in made:
        np.testing.assert_array_equal(image[~hidden()], pixels(0)[~hidden()])
    assert Image.open(shown).size[0] > 0


def test_another_sampler_makes_another_image_of_the_same_seed(folder: Path) -> None:
    for sampler in ("ddim", "ddpm"):
        translated(folder, sampler=sampler, count=1, out=folder / sampler)
    made = [np.asarray(Image.open(folder / sampler / "photo-inpainting-0000.png")) for sampler in ("ddim", "ddpm")]
    assert (made[0] != made[1])[hidden()].any()
    with pytest.raises(UsageError, match="sampler"):
        translated(folder, sampler="dmpp")


def test_an_image_is_made_again_from_what_it_says_and_the_image_that_it_was_made_of(folder: Path) -> None:
    translated(folder, seed=5, count=1, sampler="ddpm", settings=["model.num_inference_steps=3"], out=folder / "once")
    image = folder / "once" / "photo-inpainting-0005.png"
    said = read_settings(image.read_bytes()) or {}
    assert (said["model"], said["task"], said["needs"]) == ("cascade", "inpainting", ["image", "mask"])
    assert str(folder).encode() not in image.read_bytes(), "no path of this machine"
    nothing = {"seed": None, "task": None, "count": 1, "like": image}
    translated(folder, **nothing, out=folder / "again")
    again = folder / "again" / "photo-inpainting-0005.png"
    assert again.read_bytes() == image.read_bytes()
    translated(folder, **nothing | {"seed": 6}, out=folder / "again")
    other = folder / "again" / "photo-inpainting-0006.png"
    assert (np.asarray(Image.open(other)) != np.asarray(Image.open(image)))[hidden()].any()
    with pytest.raises(UsageError, match="was made with --mask: give it again"):
        translated(folder, **nothing, mask=None)


def test_an_image_of_a_condition_is_made_again_by_the_other_command(folder: Path) -> None:
    image = folder / "conditioned.png"
    image.write_bytes(with_settings(gray_png(8), settings_of(Request(condition=b"x"), model="m", version="1")))
    with pytest.raises(UsageError, match="was made with --condition, which `cascade sample` takes"):
        translated(folder, like=image)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"image": "nothing.png"}, "--image .*nothing.png: no such file"),
        ({"image": "text.png"}, "--image .*text.png: the given image can't be read"),
        ({"mask": "nothing.png"}, "--mask .*nothing.png: no such file"),
        ({"image": "small.png"}, "the image has 12x12 pixels, for inpainting this model takes 16x16"),
        ({"mask": "small.png"}, "the mask has 12x12 pixels, the image 16x16"),
    ],
)
def test_files_that_can_not_be_used_are_named(folder: Path, changes: dict[str, str], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        translated(folder, **{name: folder / file for name, file in changes.items()})


def test_a_model_that_enlarges_what_it_makes_of_nothing_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "cascade").mkdir()
    with pytest.raises(UsageError, match="this cascade decodes or enlarges what it made"):
        translate(folder / "photo.png", str(write_cascade(tmp_path)), out=tmp_path / "out")


def test_the_command_ends_in_one_line_and_exit_code_2(folder: Path) -> None:
    arguments = ["--model", str(folder / "cascade"), "--image", str(folder / "photo.png"), "--task", "inpainting"]
    done = in_process("translate", *arguments, cwd=folder)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: inpainting needs a mask")
    assert len(done.stderr.strip().splitlines()) == 1
    assert "Examples" in in_process("translate", "--help", cwd=folder).stdout
