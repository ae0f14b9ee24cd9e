"""The service's page in a real browser, over the real application with tiny models."""

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from playwright.sync_api import Browser, Page, expect

from components.sampling.cascade import Cascade, compose
from components.sampling.image_files import encode_png
from components.sampling.requests import Request, read_settings, with_settings
from tests.browser.chromium import PHONE, chromium, find_chromium, opened
from tests.browser.service_page import (
    SIDE,
    WATCH,
    KeepingBackend,
    decoded,
    drop,
    finished,
    make,
    pixels,
    ready,
    write_whole_cascade,
)
from tests.serving_backend import serving
from tests.tiny_generators import LONE, conditioned, write

pytestmark = pytest.mark.skipif(find_chromium() is None, reason="no Chromium on this machine")
PHOTO = np.random.default_rng(5).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
OVERFLOW = "document.documentElement.scrollWidth - innerWidth"
EDIT = "label:has(input[value=edit])"


@pytest.fixture(scope="module")
def backend(tmp_path_factory: pytest.TempPathFactory) -> KeepingBackend:
    return KeepingBackend(Cascade.load(write_whole_cascade(tmp_path_factory.mktemp("whole"))))


@pytest.fixture(scope="module")
def address(backend: KeepingBackend) -> Iterator[str]:
    with serving(backend) as address:
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def page(browser: Browser, address: str) -> Iterator[Page]:
    """A laptop's tab, in which nothing may go wrong."""
    with opened(browser, address) as tab:
        yield ready(tab.page)
        assert tab.complaints == []


def near(image: np.ndarray, other: np.ndarray) -> bool:
    return image.shape == other.shape and np.abs(image.astype(int) - other).max() <= 1


def give(page: Page, image: np.ndarray = PHOTO) -> None:
    """Go to editing with an image."""
    page.locator(EDIT).click()
    page.locator("#generator-translate").check(force=True)
    file = {"name": "photo.png", "mimeType": "image/png", "buffer": encode_png(image)}
    page.locator("#image-file").set_input_files(file)
    page.locator("#mask").wait_for()


def sent_mask(backend: KeepingBackend) -> np.ndarray:
    """Where the mask of the last request is white."""
    mask = backend.jobs[-1].requests[0].mask
    assert mask is not None
    return np.asarray(Image.open(io.BytesIO(mask)).convert("L")) >= 128


def test_an_image_by_class_is_the_one_that_the_cascade_makes(page: Page, backend: KeepingBackend) -> None:
    make(page, label="flags", seed="7")
    (expected,) = backend.cascade.sample([Request(label="flags", seed=7)])
    assert near(pixels(page), expected)
    shown = page.locator("#view .frame img")
    assert shown.evaluate("each => getComputedStyle(each).imageRendering") == "pixelated"
    assert shown.evaluate("each => each.clientWidth / each.naturalWidth % 1") == 0
    assert shown.get_attribute("alt") == "flags, seed 7, by Diffusion"


def test_prompt_options_and_settings_of_stages_reach_the_model(page: Page, backend: KeepingBackend) -> None:
    page.locator("#all > summary").click()
    page.locator("#stage-upsampler_16-noise_level").fill("7")
    page.locator("#option-sampler").select_option("heun")
    make(page, prompt="red apple", seed="3", **{"option-steps": "3", "option-guidance_scale": "2"})
    request = backend.jobs[-1].requests[0]
    about = {"prompt": "red apple", "seed": 3, "generator": "diffusion", "sampler": "heun"}
    own = (("upsampler_16", "noise_level", 7),)
    assert request == Request(**about, steps=3, guidance_scale=2, sampling=own)


def test_prompts_that_the_model_learned_are_offered(page: Page, backend: KeepingBackend) -> None:
    page.get_by_role("group", name="Prompts that it learned").get_by_role("button", name="red flag").click()
    make(page, seed="3")
    assert backend.jobs[-1].requests[0].prompt == "red flag"


def test_denoising_is_seen_in_at_least_four_frames(browser: Browser, backend: KeepingBackend) -> None:
    slow = KeepingBackend(backend.cascade, step_seconds=0.15)
    with serving(slow) as address, opened(browser, address) as tab:
        page = ready(tab.page)
        page.evaluate(WATCH)
        page.locator("#label").select_option("food")
        page.locator("#make").click()
        finished(page)
        page.wait_for_timeout(300)
        seen = page.evaluate("window.seen")
        assert len(set(seen)) >= 4
        assert page.evaluate("window.told") == ["waiting", *(f"step {step} of 8" for step in range(1, 9))]
        assert near(decoded(seen[-1]), pixels(page))
        frames = page.locator(".film button")
        assert frames.count() == 9
        frames.nth(0).click()
        assert page.locator("#view .frame img").get_attribute("data-frame") == "step 1 of 8"


def test_both_generators_from_one_seed_stand_next_to_each_other(page: Page, backend: KeepingBackend) -> None:
    page.locator("#both").check()
    make(page, label="animals", seed="5")
    left, right = (page.locator("#view .frame").nth(tile).bounding_box() or {} for tile in range(2))
    assert left["y"] == right["y"]
    assert left["x"] + left["width"] <= right["x"]
    for tile, name in enumerate(("diffusion", "tokens")):
        (expected,) = backend.cascade.sample([Request(label="animals", seed=5, generator=name)])
        assert near(pixels(page, tile), expected), name


def test_several_images_have_seeds_one_after_another(page: Page, backend: KeepingBackend) -> None:
    make(page, label="food", seed="20", n="3")
    assert page.locator("#view .tile").count() == 3
    (expected,) = backend.cascade.sample([Request(label="food", seed=22)])
    assert near(pixels(page, 2), expected)


def test_a_mask_drawn_with_the_mouse_is_filled_and_the_rest_stays(page: Page, backend: KeepingBackend) -> None:
    give(page)
    box = page.locator("#mask").bounding_box()
    assert box
    pixel = box["width"] / SIDE
    page.locator("#brush").fill("3")
    page.mouse.move(box["x"] + 4.5 * pixel, box["y"] + 4.5 * pixel)
    page.mouse.down()
    page.mouse.move(box["x"] + 10.5 * pixel, box["y"] + 4.5 * pixel, steps=4)
    page.mouse.up()
    make(page, seed="1")
    mask = sent_mask(backend)
    assert mask[4, 4:11].all()
    assert mask[:3].sum() == mask[7:].sum() == 0
    np.testing.assert_array_equal(pixels(page)[~mask], PHOTO[~mask])
    assert (pixels(page) != PHOTO)[mask].any()
    assert page.locator(".film button").count() == 5, "four steps and the image"


def test_a_mask_drawn_with_the_keyboard_is_filled_and_the_rest_stays(page: Page, backend: KeepingBackend) -> None:
    give(page)
    page.locator("#brush").fill("1")
    page.locator("#mask").focus()
    page.keyboard.press("ArrowUp")  # from (8, 8), the middle
    page.keyboard.down(" ")
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    page.keyboard.up(" ")
    page.keyboard.press("Shift+ArrowDown")
    page.keyboard.press(" ")
    page.keyboard.press("z")
    make(page, seed="1")
    mask = sent_mask(backend)
    assert list(zip(*np.nonzero(mask), strict=True)) == [(7, 8), (7, 9), (7, 10), (7, 11)]
    np.testing.assert_array_equal(pixels(page)[~mask], PHOTO[~mask])


def test_the_diffusion_branch_fills_a_mask_drawn_on_what_it_made(page: Page, backend: KeepingBackend) -> None:
    make(page, label="food", seed="2")
    made = pixels(page)
    page.get_by_role("button", name="Edit food, seed 2").click()
    page.locator("#mask").focus()
    page.keyboard.press(" ")
    make(page, seed="3")
    request, mask = backend.jobs[-1].requests[0], sent_mask(backend)
    assert (request.task, request.generator) == ("inpainting", "diffusion")
    np.testing.assert_array_equal(pixels(page)[~mask], made[~mask])
    assert (pixels(page) != made)[mask].any()


def test_an_image_that_was_made_can_be_edited_and_other_tasks_need_no_mask(page: Page, backend: KeepingBackend) -> None:
    make(page, label="flags", seed="2")
    made = pixels(page)
    page.get_by_role("button", name="Edit flags, seed 2").click()
    page.locator("#generator-translate").check(force=True)
    page.locator("#mask").wait_for()
    page.locator("#task").select_option("colorization")
    make(page, seed="4")
    request = backend.jobs[-1].requests[0]
    assert (request.task, request.generator, request.mask) == ("colorization", "translate", None)
    given = np.asarray(Image.open(io.BytesIO(request.image or b"")))
    np.testing.assert_array_equal(given, made)


def test_a_link_fills_the_controls_and_makes_the_same_pixels(page: Page, browser: Browser, address: str) -> None:
    page.locator("#generator-tokens").check(force=True)
    make(page, label="food", seed="9", **{"option-temperature": "0.7", "option-top_k": "5"})
    made = pixels(page)
    link = page.get_by_role("link", name="Link to food, seed 9").get_attribute("href")
    assert link
    assert link.startswith(address)
    with opened(browser, link) as tab:
        other = ready(tab.page)
        assert other.locator("#seed").input_value() == "9"
        assert other.locator("#label").input_value() == "food"
        assert other.locator("#option-temperature").input_value() == "0.7"
        make(other)
        np.testing.assert_array_equal(pixels(other), made)


def test_a_dropped_png_restores_the_settings_that_it_was_made_by(page: Page, browser: Browser, address: str) -> None:
    page.locator("#all > summary").click()
    page.locator("#stage-upsampler_16-noise_level").fill("3")
    make(page, prompt="grey cat é", seed="11", **{"option-steps": "5"})
    made = pixels(page)
    with page.expect_download() as download:
        page.get_by_role("link", name="Download").click()
    png = Path(download.value.path()).read_bytes()
    settings = read_settings(png)
    assert settings is not None
    assert settings["prompt"] == "grey cat é"
    with opened(browser, address) as tab:
        other = ready(tab.page)
        drop(other, png)
        other.locator("#notice").filter(has_text="settings").wait_for()
        assert other.locator("#prompt").input_value() == "grey cat é"
        assert other.locator("#option-steps").input_value() == "5"
        assert other.locator("#stage-upsampler_16-noise_level").input_value() == "3"
        make(other)
        np.testing.assert_array_equal(pixels(other), made)


def test_settings_by_stage_of_what_has_a_short_control_are_restored(page: Page, backend: KeepingBackend) -> None:
    """As `cascade sample --set` and the API's `sampling` write them."""
    stages = {"base": {"num_inference_steps": 3, "guidance_scale": 4.0, "spacing": [1, 2, 3]}}
    settings = {"model": "tiny", "generator": "diffusion", "seed": 5, "prompt": "cat", "sampling": stages}
    drop(page, with_settings(encode_png(PHOTO), settings))
    page.locator("#notice").filter(has_text="settings").wait_for()
    assert page.locator("#option-guidance_scale").input_value() == "4"
    assert page.locator("#stage-base-spacing").input_value() == "[1,2,3]"
    make(page)
    asked = backend.jobs[-1].requests[0]
    assert (asked.steps, asked.guidance_scale) == (3, 4.0)
    assert ("base", "spacing", (1, 2, 3)) in asked.sampling


def test_settings_in_every_kind_of_text_chunk_are_read(page: Page) -> None:
    for seed, (kind, zipped) in enumerate([("text", False), ("text", True), ("itxt", False), ("itxt", True)], 41):
        info, file = PngInfo(), io.BytesIO()
        text = f'{{"model": "tiny", "seed": {seed}, "label": "food", "sampling": "{{}}"}}'
        add = info.add_text if kind == "text" else info.add_itxt
        add("parameters", text, zip=zipped)
        Image.fromarray(PHOTO).save(file, format="PNG", pnginfo=info)
        drop(page, file.getvalue())
        expect(page.locator("#seed")).to_have_value(str(seed))
        assert page.locator("#label").input_value() == "food"
    drop(page, with_settings(encode_png(PHOTO), {"model": "tiny", "seed": -(2**60) - 1}))
    page.locator("#notice").filter(has_text="more digits than a page keeps").wait_for()


def test_what_the_service_refuses_is_shown_as_a_sentence(browser: Browser, address: str) -> None:
    with opened(browser, address) as tab:
        page = ready(tab.page)
        page.locator("#label").select_option("food")
        page.locator("#option-steps").fill("5000")
        page.locator("#make").click()
        alert = page.get_by_role("alert")
        alert.wait_for()
        assert alert.text_content() == "Steps must be at most 1000 here, not 5000."
        page.locator("#option-steps").fill("60")
        page.locator("#make").click()
        page.locator("#trouble").filter(has_text="[1, 50]").wait_for()
        page.locator("#option-steps").fill("4")
        make(page)
        assert alert.count() == 0
        page.locator(EDIT).click()
        page.locator("#make").click()
        page.locator("#trouble").filter(has_text="Choose an image to work on first.").wait_for()
        drop(page, b"no image", "notes.txt", on="#image-drop")
        page.locator("#trouble").filter(has_text="notes.txt is no image").wait_for()


def test_stop_cancels_the_images_that_are_being_made(browser: Browser, backend: KeepingBackend) -> None:
    slow = KeepingBackend(backend.cascade, step_seconds=0.4)
    with serving(slow) as address, opened(browser, address) as tab:
        page = ready(tab.page)
        page.locator("#label").select_option("food")
        page.locator("#make").click()
        page.locator("#view progress[value]").wait_for()
        page.locator("#stop").click()
        page.locator(".progress").filter(has_text="stopped at step").wait_for()
        assert page.locator("#make").is_enabled()
        page.wait_for_timeout(500)
        assert slow.left == slow.jobs
        assert tab.complaints == []
        assert page.locator("#trouble").is_hidden()


def test_a_key_is_asked_for_where_the_service_wants_one(browser: Browser, backend: KeepingBackend) -> None:
    with (
        serving(backend, keys=("secret-one", "secret-two"), keys_required=True) as address,
        opened(browser, address) as tab,
    ):
        page = tab.page
        page.get_by_role("dialog").wait_for()
        assert page.locator("#key").get_attribute("type") == "password"
        page.locator("#key").fill("wrong")
        page.keyboard.press("Enter")
        page.get_by_text("The service does not know this key.").wait_for()
        assert violations(page) == []
        page.locator("#key").fill("secret-two")
        page.keyboard.press("Enter")
        ready(page)
        make(page, label="food")
        page.reload()
        ready(page)
        assert page.evaluate("sessionStorage.length") == 1
        assert page.evaluate("localStorage.length") == 0
        assert not [url for url in tab.requests if "secret" in url]


def test_the_history_survives_a_reload_and_brings_settings_back(page: Page) -> None:
    make(page, label="flags", seed="31")
    made = pixels(page)
    make(page, label="food", seed="32", **{"option-steps": "6"})
    page.reload()
    ready(page)
    assert page.locator("#past li").count() == 2
    page.get_by_role("button", name="flags, seed 31, by Diffusion").first.click()
    page.locator("#view .tile .tools").wait_for()
    np.testing.assert_array_equal(pixels(page), made)
    assert (page.locator("#seed").input_value(), page.locator("#label").input_value()) == ("31", "flags")
    assert page.locator("#option-steps").input_value() == "4"
    page.get_by_role("button", name="Delete food, seed 32, by Diffusion").click()
    expect(page.locator("#past li")).to_have_count(1)
    page.locator("#forget").click()
    page.locator("#forget-yes").click()
    page.locator("#history").wait_for(state="hidden")
    page.reload()
    assert ready(page).locator("#past li").count() == 0


def test_an_edit_comes_back_from_the_history_with_its_image_and_mask(page: Page, backend: KeepingBackend) -> None:
    give(page)
    page.locator("#mask").click(position={"x": 40, "y": 40})
    make(page, seed="6")
    made, mask = pixels(page), sent_mask(backend)
    page.reload()
    ready(page).locator(".again").click()
    page.locator("#view .tile .tools").wait_for()
    make(page)
    np.testing.assert_array_equal(sent_mask(backend), mask)
    np.testing.assert_array_equal(pixels(page), made)


def test_controls_are_those_of_the_model_that_is_chosen(
    browser: Browser, backend: KeepingBackend, tmp_path: Path
) -> None:
    kind, network, settings = LONE["gan"]
    classes = [f"kind {number}" for number in range(30)]
    model = write(tmp_path / "gan", kind, network | {"num_classes": 30}, settings | {"classes": classes})
    other = KeepingBackend(Cascade.load(compose(tmp_path / "cascade", model=model)), name="gan")
    with serving(backend, other) as address, opened(browser, address) as tab:
        page = ready(tab.page)
        assert page.locator("#prompt").is_visible()
        page.locator("#model").select_option("gan")
        for gone in ("#prompt", "#generators", "#modes", "#option-steps"):
            assert page.locator(gone).is_hidden(), gone
        assert page.locator("#label").get_attribute("list") == "classes", "many classes are searched by typing"
        make(page, label="kind 17", **{"option-truncation": "0.5"})
        assert (other.jobs[-1].requests[0].label, other.jobs[-1].requests[0].truncation) == ("kind 17", 0.5)
        assert page.locator(".film").is_hidden()


def test_an_image_that_a_model_is_conditioned_on_is_dropped(browser: Browser, tmp_path: Path) -> None:
    backend = KeepingBackend(Cascade.load(conditioned(tmp_path)))
    with serving(backend) as address, opened(browser, address) as tab:
        page = ready(tab.page)
        larger = np.zeros((2 * SIDE, 2 * SIDE, 3), np.uint8)
        drop(page, encode_png(larger), on="#condition-drop")
        page.locator("#condition-shown").wait_for()
        make(page)
        given = np.asarray(Image.open(io.BytesIO(backend.jobs[-1].requests[0].condition or b"")))
        np.testing.assert_array_equal(given, larger[:SIDE, :SIDE])


def test_a_service_that_does_not_answer_is_asked_again(browser: Browser, backend: KeepingBackend) -> None:
    with serving(backend) as address, opened(browser, address) as tab:
        page = ready(tab.page)
        page.route("**/v1/**", lambda route: route.abort())
        page.reload()
        page.locator("#trouble").filter(has_text="does not answer").wait_for()
        page.unroute("**/v1/**")
        page.locator("#make").click()
        ready(page)
        make(page, label="food")


def violations(page: Page) -> list[str]:
    """What axe-core finds, in short."""
    found = Axe().run(page).response["violations"]
    return [f"{each['id']}: {node['html'][:120]}" for each in found for node in each["nodes"]]


@pytest.mark.parametrize("width", ["laptop", "phone"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_and_nothing_is_wider_than_the_window(
    browser: Browser, address: str, width: str, scheme: str
) -> None:
    viewport = {"viewport": PHONE, "has_touch": True} if width == "phone" else {}
    with opened(browser, address, color_scheme=scheme, **viewport) as tab:
        page = ready(tab.page)
        assert violations(page) == [], "at the start"
        page.locator("#more").evaluate("each => each.open = true")
        page.locator("#all").evaluate("each => each.open = true")
        page.locator("#both").check()
        make(page, label="flags", prompt="red flag", seed="1")
        assert violations(page) == [], "with images"
        assert page.evaluate(OVERFLOW) <= 0
        give(page)
        page.locator("#mask").click()
        assert violations(page) == [], "editing"
        assert page.evaluate(OVERFLOW) <= 0
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
        assert (max(ground) < 60) == (scheme == "dark")
        assert tab.complaints == []


def test_everything_is_done_by_keyboard_and_told_to_screen_readers(page: Page) -> None:
    page.keyboard.press("Tab")
    visited = []
    for _ in range(60):
        visited.append(page.evaluate("document.activeElement.id || document.activeElement.name"))
        if visited[-1] == "make":
            break
        page.keyboard.press("Tab")
    assert visited[-1] == "make"
    assert {"open-file", "mode", "prompt", "label", "generator-diffusion", "both", "seed", "new-seed", "n"} <= {
        *visited
    }
    page.locator("#label").select_option("food")
    page.locator("#prompt").focus()
    page.keyboard.press("Enter")
    finished(page)
    assert "finished: food, seed" in (page.locator("#status").text_content() or "")
    page.locator("#new-seed").focus()
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineWidth")
    assert outline == "3px"


def test_nothing_moves_where_less_motion_is_wanted(browser: Browser, backend: KeepingBackend) -> None:
    slow = KeepingBackend(backend.cascade, step_seconds=0.4)
    with serving(slow) as address, opened(browser, address, reduced_motion="reduce") as tab:
        page = ready(tab.page)
        page.locator("#label").select_option("food")
        page.locator("#make").click()
        page.locator(".tile").wait_for()
        assert page.evaluate("document.getAnimations().length") == 0
        page.locator("#stop").click()
