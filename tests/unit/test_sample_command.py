"""`cascade sample`: how an image is asked for reaches the models, and what can't be done is one line."""

import base64
import io
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from components.configuration.usage import UsageError
from components.sampling.answers import predictor_of
from components.sampling.cascade import Cascade
from components.sampling.image_files import encode_png, gray_png
from components.sampling.requests import Request, RequestRow, read_settings, request_of, settings_of, with_settings
from pipelines.command.sample import sample
from tests.in_process import finished, in_process
from tests.refusals import assert_refused, one_line
from tests.tiny_diffusion_branches import classifier_guided, imagen
from tests.tiny_generators import PRIORS, conditioned, lone, token_branch

UNKNOWN_SAMPLER = "base.sampler: Input should be 'ddpm'"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cascade whose base is guided by a classifier."""
    return classifier_guided(tmp_path_factory.mktemp("sample"))


def sampled(folder: Path, out: Path, **changes: object) -> list[np.ndarray]:
    """Images of class 1."""
    sample(**({"model": str(folder), "label": ["1"], "seed": 4, "count": 1, "out": out} | changes))
    return [np.asarray(Image.open(path)) for path in sorted(out.glob("*.png")) if path.name != "grid.png"]


HOWS = ({"sampler": "heun"}, {"classifier_scale": 0.0}, {"classifier_scale": 9.0, "steps": 3}, {"truncation": 0.5})


@pytest.mark.parametrize("how", HOWS)
def test_what_is_asked_for_is_what_is_sampled(folder: Path, how: dict, tmp_path: Path) -> None:
    model = lone("gan", tmp_path / "gan") if "truncation" in how else folder
    (made,) = sampled(model, tmp_path / "out", **how)
    plain, wanted = Cascade.load(model).sample([Request(label=1, seed=4), Request(label=1, seed=4, **how)])
    np.testing.assert_array_equal(made, wanted)
    assert (made != plain).any()


def test_a_lone_base_makes_the_images_that_it_makes_in_a_cascade_of_its_own(folder: Path, tmp_path: Path) -> None:
    """What `cascade ema` writes is such a folder."""
    (made,) = sampled(folder / "base", tmp_path / "alone", steps=3, sampler="ddpm")
    (wanted,) = sampled(folder, tmp_path / "cascade", steps=3, classifier_scale=0.0)
    np.testing.assert_array_equal(made, wanted)


@pytest.mark.parametrize("file", ["base/model.safetensors", "base/model.json", "cascade.json"])
def test_a_copy_that_broke_off_is_one_line_that_names_the_file(folder: Path, file: str, tmp_path: Path) -> None:
    for cut in (lambda path: path.write_bytes(path.read_bytes()[:9]), Path.unlink):
        copy = Path(shutil.copytree(folder, tmp_path / cut.__name__))
        cut(copy / file)
        done = in_process("sample", "--model", str(copy), "--label", "1", cwd=tmp_path)
        assert_refused(done, str(copy), *([Path(file).name] if file != "cascade.json" else []))


def test_a_damaged_tokenizer_is_one_line_that_names_the_file(tmp_path: Path) -> None:
    broken = imagen(tmp_path) / "contrastive" / "bpe.json"
    broken.write_text("{}")
    done = in_process("sample", "--model", str(broken.parents[1]), "--prompt", "red apple", cwd=tmp_path)
    assert_refused(done, f"{broken} is missing or damaged")


def test_every_image_has_a_file_also_where_words_are_alike_at_their_beginning(folder: Path, tmp_path: Path) -> None:
    assert len(sampled(folder, tmp_path, label=["1", "1"], count=2, steps=1, sampler="ddpm")) == 4


def test_no_other_image_is_replaced_by_one_of_the_same_name(folder: Path, tmp_path: Path) -> None:
    """Its name has the seed and the first letters of the words, not the settings."""
    first = sampled(folder, tmp_path, steps=1, sampler="ddpm")[0]
    both = sampled(folder, tmp_path, steps=2, sampler="ddpm")
    assert len(both) == 2
    assert any((image == first).all() for image in both)
    assert len(sampled(folder, tmp_path, steps=2, sampler="ddpm")) == 2, "the same image again is the same file"


def test_an_out_that_is_no_folder_is_refused_before_anything_is_made(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with one_line(UsageError, match="is no folder that can be written to"):
            sampled(folder, out)


FILTERS = ({"temperature": 0.5}, {"top_k": 2}, {"top_p": 0.3}, {"size": (16, 32)}, {"size": (16, 32), "top_k": 2})


@pytest.mark.parametrize("how", FILTERS)
def test_filters_and_windows_of_tokens_are_asked_for_by_the_command_and_by_a_row(how: dict, tmp_path: Path) -> None:
    folder = token_branch(PRIORS["transformer"], tmp_path)
    plain, wanted = (Cascade.load(folder).sample([Request(label=1, seed=4, **asked)])[0] for asked in ({}, how))
    assert plain.tobytes() != wanted.tobytes()
    written = how | ({"size": "32x16"} if "size" in how else {})
    (made,) = sampled(folder, tmp_path / "out", **written)
    np.testing.assert_array_equal(made, wanted)
    (answer,) = predictor_of(folder)([RequestRow(label="1", seed=4, **written)])
    png, request = base64.b64decode(answer), Request(label="1", seed=4, **how)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(png))), wanted)
    assert read_settings(png) == settings_of(request, model=folder.name, version=None)
    assert RequestRow.of(request).request() == request


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"sampler": "plms"}, UNKNOWN_SAMPLER),
        ({"guidance_scale": 1e300}, "guidance_scale must be of a size from 1e-06 to 1e[+]09"),
        ({"classifier_scale": float("inf")}, "classifier.guidance_scale: Input should be a finite number"),
    ],
)
def test_what_can_not_be_sampled_is_one_line(folder: Path, how: dict, words: str, tmp_path: Path) -> None:
    with one_line(UsageError, match=words):
        sampled(folder, tmp_path, **how)


def test_a_setting_of_any_stage_can_be_asked_for(folder: Path, tmp_path: Path) -> None:
    (made,) = sampled(folder, tmp_path, settings=["base.guidance_interval=[0.2, 5.0]", "base.guidance_scale=3"])
    asked = Request(label=1, seed=4, guidance_scale=3.0, sampling=(("base", "guidance_interval", (0.2, 5.0)),))
    plain, wanted = Cascade.load(folder).sample([asked.replace(sampling=()), asked])
    np.testing.assert_array_equal(made, wanted)
    assert (made != plain).any()
    for wrong in ("base", "base.eta", "eta=0.5"):
        with pytest.raises(UsageError, match=f"--set '{wrong}': write it as STAGE.SETTING=VALUE"):
            sampled(folder, tmp_path, settings=[wrong])


def test_a_cascade_without_a_classifier_takes_no_scale_of_one(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="classifier_scale needs a cascade with a classifier"):
        sampled(imagen(tmp_path), tmp_path / "out", label=[], prompt=["red"], classifier_scale=1.0)


def test_a_text_encoder_that_can_not_be_loaded_is_one_line(tmp_path: Path) -> None:
    folder = imagen(tmp_path)
    (folder / "contrastive" / "bpe.json").unlink()
    with one_line(UsageError, match=r"no contrastive one with its bpe\.json"):
        sampled(folder, tmp_path / "out", label=[], prompt=["red"])


def again(image: Path, folder: Path, out: Path, **changes: object) -> list[np.ndarray]:
    """`--like` alone, but for the changes."""
    nothing = {"label": [], "seed": None, "count": None, "like": image}
    return sampled(folder, out, **(nothing | changes))


def the_image(out: Path) -> Path:
    (image,) = (path for path in out.glob("*.png") if path.name != "grid.png")
    return image


HOW = {"steps": 3, "sampler": "ddpm", "guidance_scale": 2.0, "settings": ["base.threshold=dynamic"]}


def test_an_image_says_how_it_was_made_and_is_made_again_from_what_it_says(folder: Path, tmp_path: Path) -> None:
    (made,) = sampled(folder, tmp_path, **HOW)
    png = the_image(tmp_path).read_bytes()
    said = read_settings(png) or {}
    assert (said["model"], said.get("version")) == (folder.name, None)
    assert str(tmp_path.parent).encode() not in png, "no path of this machine"
    sampling = (("base", "threshold", "dynamic"),)
    request = Request(label="1", seed=4, generator="diffusion", steps=3, sampler="ddpm", guidance_scale=2.0)
    assert request_of(said) == request.replace(sampling=sampling)
    (same,) = again(the_image(tmp_path), folder, tmp_path / "again")
    np.testing.assert_array_equal(made, same)
    assert the_image(tmp_path / "again").read_bytes() == png


@pytest.mark.parametrize(
    ("prior", "how"),
    [("transformer", {"size": "32x16", "top_k": 3}), ("transformer", {"best_of": 2}), ("masked", {"temperature": 0.0})],
)
def test_tokens_are_drawn_again_from_what_an_image_says(prior: str, how: dict, tmp_path: Path) -> None:
    folder = token_branch(PRIORS[prior], tmp_path)
    (made,) = sampled(folder, tmp_path / "out", **how)
    (same,) = again(the_image(tmp_path / "out"), folder, tmp_path / "again")
    np.testing.assert_array_equal(made, same)


def test_options_are_stronger_than_what_the_image_was_made_by(folder: Path, tmp_path: Path) -> None:
    sampled(folder, tmp_path, **HOW, classifier_scale=0.0)
    image, wanted = the_image(tmp_path), Cascade.load(folder)
    request = request_of(read_settings(image.read_bytes()) or {})
    for number, (changes, replaced) in enumerate(
        (
            ({"steps": 4}, {"steps": 4}),
            ({"seed": 9, "count": 2}, {"seed": 10}),
            ({"label": ["2"]}, {"label": "2"}),
            ({"classifier_scale": 5.0}, {"classifier_scale": 5.0}),
            ({"settings": ["base.threshold=static"]}, {"sampling": (("base", "threshold", "static"),)}),
        )
    ):
        made = again(image, folder, tmp_path / str(number), **changes)
        (other,) = wanted.sample([request.replace(**replaced)])
        assert np.abs(made[-1].astype(int) - other).max() <= 1, changes


def test_an_option_is_stronger_than_a_setting_that_the_image_has_of_the_same(folder: Path, tmp_path: Path) -> None:
    settings = ["base.num_inference_steps=3", "classifier.guidance_scale=9", "base.threshold=dynamic"]
    sampled(folder, tmp_path, settings=settings)
    again(the_image(tmp_path), folder, tmp_path / "again", steps=5, classifier_scale=0.0)
    found = request_of(read_settings(the_image(tmp_path / "again").read_bytes()) or {})
    assert (found.steps, found.classifier_scale) == (5, 0.0)
    assert found.sampling == (("base", "threshold", "dynamic"),)


def test_a_condition_image_must_be_given_again(tmp_path: Path) -> None:
    folder, depth = conditioned(tmp_path), tmp_path / "depth.png"
    depth.write_bytes(encode_png(np.full((16, 16), 20_000, np.uint16)))
    (made,) = sampled(folder, tmp_path / "out", label=[], condition=[depth])
    image = the_image(tmp_path / "out")
    with pytest.raises(UsageError, match="was made with --condition: give it again"):
        again(image, folder, tmp_path / "again")
    (same,) = again(image, folder, tmp_path / "again", condition=[depth])
    np.testing.assert_array_equal(made, same)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (None, "no such file"),
        (b"no image", "not a PNG"),
        (gray_png(8), "this PNG has no settings"),
        (with_settings(gray_png(8), {"seed": "x"}), "the PNG says seed 'x'"),
        (with_settings(gray_png(8), {"model": "m", "seed": 1}), "only the image of a registered model names its own"),
        (
            with_settings(gray_png(8), {"model": "a/../b", "version": "1"}),
            "only the image of a registered model names its own",
        ),
        (with_settings(gray_png(8), settings_of(Request(image=b"x"), model="m", version="1")), "cascade translate"),
    ],
)
def test_an_image_that_can_not_be_made_again_is_one_line(data: bytes | None, words: str, folder: Path, tmp_path: Path):
    image = tmp_path / "image.png"
    if data is not None:
        image.write_bytes(data)
    model = {"model": None} if "registered" in words else {}
    with one_line(UsageError, match=words):
        again(image, folder, tmp_path / "out", **model)


def test_without_a_model_and_an_image_a_model_must_be_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="name the model with --model"):
        sampled(folder, tmp_path, model=None)


def test_the_command_takes_the_options_and_ends_in_exit_code_2(folder: Path, tmp_path: Path) -> None:
    command = ["sample", "--model", str(folder)]
    asked = [*command, "--label", "1", "--count", "1"]
    done = in_process(*asked, "--sampler", "plms", cwd=tmp_path)
    assert_refused(done, "error: base.sampler: Input should be 'ddpm'")
    made = in_process(*asked, "--sampler", "ddim", "--classifier-scale", "2", "--out", "made", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    image = tmp_path / "made" / "1-diffusion-0000.png"
    done = finished(*command, "--like", str(image), "--out", "again", cwd=tmp_path)
    assert (tmp_path / "again" / image.name).read_bytes() == image.read_bytes()
