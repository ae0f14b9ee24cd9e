"""The translate generator and its command: known pixels stay as they came in, what can't be made is one line."""

import base64
import io
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from PIL import Image

from components.configuration.usage import UsageError
from components.evaluation.generated import SampledImages, jobs_of, pack_job
from components.evaluation.restoration import RestorationConfig, RestorationStudy, asked_of, colorfulness, damage, psnr
from components.evaluation.study import StudyPlan
from components.models.diffusion.corruption import MASK_TASKS, TASKS
from components.runtime.pool import file_name
from components.runtime.storage.store import Store
from components.runtime.tracking.registry import input_example
from components.sampling.answers import predictor_of
from components.sampling.cascade import Cascade
from components.sampling.image_files import encode_png, gray_png
from components.sampling.requests import Request, RequestRow, read_settings, settings_of, with_settings
from pipelines.command.sample import translate
from tests.in_process import in_process
from tests.refusals import assert_refused, one_line
from tests.tiny_palette import SIDE, hidden, pixels, write_palette


@pytest.fixture(scope="module")
def cascade(tmp_path_factory: pytest.TempPathFactory) -> Cascade:
    return Cascade.load(write_palette(tmp_path_factory.mktemp("palette")))


def request_of(task: str, seed: int = 0) -> Request:
    if task in MASK_TASKS:
        mask = encode_png(hidden(4 + seed % 3).astype(np.uint8) * 255)
        return Request(task=task, image=encode_png(pixels(seed)), mask=mask, seed=seed, generator="translate")
    side = SIDE // 2 if task == "super_resolution" else SIDE
    return Request(task=task, image=encode_png(pixels(seed, side)), seed=seed, generator="translate")


@pytest.mark.parametrize("task", MASK_TASKS)
def test_known_pixels_are_exactly_those_of_the_input_and_the_mask_is_made(cascade: Cascade, task: str) -> None:
    for seed in range(3):
        (made,) = cascade.sample([request_of(task, seed)])
        where = hidden(4 + seed % 3)
        np.testing.assert_array_equal(made[~where], pixels(seed)[~where])
        assert (made[where] != pixels(seed)[where]).mean() > 0.5


@pytest.mark.parametrize("task", TASKS)
def test_a_image_is_the_same_in_whatever_batch_and_another_with_another_seed(cascade: Cascade, task: str) -> None:
    requests = [request_of(each, seed) for seed in range(2) for each in (task, *TASKS)]
    together, alone = cascade.sample(requests), cascade.sample(requests, batch_size=1)
    assert max(np.abs(a.astype(int) - b).max() for a, b in zip(together, alone, strict=True)) <= 1
    (other,) = cascade.sample([requests[0].replace(seed=9)])
    assert (other != together[0]).any()
    assert together[0].shape == (SIDE, SIDE, 3)


@pytest.mark.parametrize("task", TASKS)
def test_what_is_made_depends_on_the_image_that_is_given(cascade: Cascade, task: str) -> None:
    first, second = request_of(task, 0), request_of(task, 3)  # masks of both are the same
    made, other = cascade.sample([first, second.replace(seed=first.seed)])
    where = hidden(4) if task in MASK_TASKS else np.ones((SIDE, SIDE), bool)
    assert (made[where] != other[where]).any()


def test_what_the_mask_hides_is_never_looked_at(cascade: Cascade) -> None:
    request = request_of("inpainting")
    changed = np.where(hidden()[..., None], 255 - pixels(0), pixels(0))
    made, other = cascade.sample([request, request.replace(image=encode_png(changed))])
    np.testing.assert_array_equal(made, other)


def test_colors_of_a_image_to_color_are_never_looked_at(cascade: Cascade) -> None:
    gray = np.array(Image.fromarray(pixels(0)).convert("L").convert("RGB"))
    request = request_of("colorization")
    made, other = cascade.sample([request, request.replace(image=encode_png(gray))])
    assert np.abs(made.astype(int) - other).max() <= 1


def test_one_task_needs_no_name_and_a_prompt_is_heard(tmp_path: Path) -> None:
    """Text-guided inpainting as GLIDE does it."""
    glide = Cascade.load(write_palette(tmp_path, text=True, tasks=["inpainting"]))
    nameless = request_of("inpainting").replace(task=None)
    plain, named, guided = glide.sample(
        [nameless, nameless.replace(task="inpainting"), nameless.replace(prompt="red apple", guidance_scale=3.0)]
    )
    np.testing.assert_array_equal(plain, named)
    assert (guided[hidden()] != plain[hidden()]).any()
    np.testing.assert_array_equal(guided[~hidden()], pixels(0)[~hidden()])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image": None}, "an image to work on is missing"),
        ({"mask": None}, "inpainting needs a mask"),
        ({"task": None}, "name a task: this model was trained for inpainting, uncropping"),
        ({"task": "rotation"}, "unknown task 'rotation': choose inpainting or"),
        ({"task": "colorization"}, "colorization takes no mask"),
        ({"image": encode_png(pixels(0, 12))}, "the image has 12x12 pixels, for inpainting this model takes 16x16"),
        ({"mask": encode_png(hidden(side=12).astype(np.uint8) * 255)}, "the mask has 12x12 pixels, the image 16x16"),
        ({"mask": encode_png(np.zeros((16, 16), np.uint8))}, "the mask has no white pixel"),
        ({"image": b"no image"}, "can't be read"),
        ({"task": "super_resolution", "mask": None}, "16x16 pixels, for super_resolution this model takes 8x8 or 4x4"),
        ({"label": 0}, "takes no label"),
        ({"prompt": "red"}, "takes no prompt"),
        ({"steps": 51}, r"steps must be in \[1, 50\], not 51"),
    ],
)
def test_what_can_not_be_made_is_refused_in_one_line(cascade: Cascade, changes: dict[str, Any], words: str) -> None:
    with one_line(ValueError, match=words):
        cascade.sample([request_of("inpainting").replace(**changes)])


def test_a_task_that_the_model_does_not_know_is_refused(tmp_path: Path) -> None:
    cascade = Cascade.load(write_palette(tmp_path, tasks=["jpeg", "colorization"]))
    with pytest.raises(ValueError, match="was not trained for inpainting: jpeg, colorization"):
        cascade.sample([request_of("inpainting")])


def test_a_registered_model_takes_its_example_and_answers_as_the_cascade(tmp_path: Path) -> None:
    folder = write_palette(tmp_path)
    for model in (folder, folder / "model"):
        (answer,) = predictor_of(model)([RequestRow(**row) for row in input_example(model)])
        assert Image.open(io.BytesIO(base64.b64decode(answer))).size == (SIDE, SIDE)
    request = request_of("inpainting", 1)
    given = {name: base64.b64encode(getattr(request, name)).decode() for name in ("image", "mask")}
    (answer,) = predictor_of(folder)([RequestRow(task="inpainting", seed=1, **given)])
    with Image.open(io.BytesIO(base64.b64decode(answer))) as image:
        np.testing.assert_array_equal(np.asarray(image), Cascade.load(folder).sample([request])[0])


def test_held_out_images_are_damaged_by_every_task_restored_and_drawn(
    cascade: Cascade, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    originals = np.stack([pixels(seed) for seed in range(3)])
    how: dict[str, Any] = {"tasks": TASKS, "mask_area": (0.2, 0.5), "factors": (2, 4)}
    damaged = damage(originals, **how)
    assert [each.name for each in damaged] == [
        *MASK_TASKS,
        "colorization",
        *(f"jpeg quality {quality}" for quality in (5, 10, 20)),
        *(f"super resolution {factor} times" for factor in (2, 4)),
    ]
    for first, second in zip(damaged, damage(originals, **how), strict=True):
        assert first.requests == second.requests
    files, groups = Store(str(tmp_path)), {}
    for each in damaged:
        made = np.stack(cascade.sample(each.requests))
        assert made.shape == originals.shape
        np.testing.assert_array_equal(made[~each.mask], originals[~each.mask])
        (job,) = groups[each.name] = jobs_of(each.name, each.requests)
        files.write(file_name(job.name), pack_job(SampledImages({"image": made}, {})))
    monkeypatch.setattr(RestorationStudy, "degraded", lambda study: (None, originals, damaged))
    study: Any = RestorationStudy(RestorationConfig(), cast(Any, None), {}, files, "restoration")
    found = study.findings(StudyPlan(groups), {"jpeg quality 5": 12.0})
    assert set(found.summary) >= {"psnr_inpainting", "psnr_jpeg_quality_5_degraded", "colorfulness_colorization"}
    assert Image.open(io.BytesIO(found.images["restored"])).size[0] > 0
    (table,) = found.tables.values()
    assert [row[3] for row in table["rows"] if row[0] == "jpeg quality 5"] == [12.0]
    assert all(len(row) == len(table["columns"]) for row in table["rows"])


def test_images_are_asked_for_by_what_the_model_takes(cascade: Cascade, tmp_path: Path) -> None:
    labels, captions = np.arange(3), ("red apple", " ", "red apple " * 20)
    assert asked_of(cascade.makers["translate"].first, labels, captions) == [Request()] * 3
    glide = Cascade.load(write_palette(tmp_path, text=True)).makers["translate"].first
    assert [request.prompt for request in asked_of(glide, labels, captions)] == ["red apple", None, None]


def test_colorfulness_is_nothing_for_gray_and_that_of_the_formula_for_known_images() -> None:
    """One color has no deviation; of red and its complement the opponents are ±255 and ±127.5, around gray."""
    gray = np.broadcast_to(pixels(0)[..., :1], (1, *pixels(0).shape))
    red, cyan = (np.full((4, 4, 3), color, dtype=np.uint8) for color in ((255, 0, 0), (0, 255, 255)))
    distance = np.hypot(255, 127.5)
    assert colorfulness(gray) == 0
    assert colorfulness(red[None]) == pytest.approx(0.3 * distance)
    assert colorfulness(np.concatenate([red, cyan])[None]) == pytest.approx(distance)
    assert colorfulness(np.stack([red, np.zeros_like(red)])) == pytest.approx(0.15 * distance)  # a mean over images


def test_psnr_looks_at_the_mask_alone() -> None:
    original, where = np.full((1, 4, 4, 3), 100, np.uint8), np.zeros((1, 4, 4), bool)
    where[0, 0] = True
    made = original.copy()
    made[0, 1:] = 0  # outside
    assert psnr(made, original, where) > 58  # nothing but rounding
    made[0, 0] = 110
    assert psnr(made, original, where) == pytest.approx(10 * np.log10(255**2 / 100))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, an image and a mask, on disk."""
    folder = tmp_path_factory.mktemp("translate")
    write_palette(folder)
    Image.fromarray(pixels(0)).save(folder / "photo.png")
    Image.fromarray(hidden().astype(np.uint8) * 255).save(folder / "mask.png")
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
    ],
)
def test_files_that_can_not_be_used_are_named(folder: Path, changes: dict[str, str], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        translated(folder, **{name: folder / file for name, file in changes.items()})


def test_the_command_ends_in_one_line_and_exit_code_2(folder: Path) -> None:
    arguments = ["--model", str(folder / "cascade"), "--image", str(folder / "photo.png"), "--task", "inpainting"]
    done = in_process("translate", *arguments, cwd=folder)
    assert_refused(done, "error: inpainting needs a mask")
    assert "Examples" in in_process("translate", "--help", cwd=folder).stdout
