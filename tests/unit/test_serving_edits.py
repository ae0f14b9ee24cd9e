"""Laws of edits: what a mask keeps stays exactly, both meanings of masks are one, and each task is answered."""

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from PIL import Image

from components.sampling.cascade import Cascade
from components.sampling.requests import Request
from tests.serving_backend import HTTP, SmallBackend, official, pixels, serving
from tests.tiny_palette import write_palette

SIDE = 8
PHOTO = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
HIDDEN = np.zeros((SIDE, SIDE), bool)
HIDDEN[2:6, 3:] = True
WIDE_HIDDEN = np.zeros((16, 16), bool)
WIDE_HIDDEN[5:12, 3:9] = True
WIDE = np.random.default_rng(1).integers(0, 256, (16, 16, 3), dtype=np.uint8)


def file(image: np.ndarray, file_format: str = "PNG", **options: Any) -> bytes:
    data = io.BytesIO()
    Image.fromarray(image).save(data, format=file_format, **options)
    return data.getvalue()


def white(hidden: np.ndarray) -> np.ndarray:
    return hidden.astype(np.uint8) * 255


def transparent(image: np.ndarray, hidden: np.ndarray) -> np.ndarray:
    return np.dstack([image, white(~hidden)])


def edited(client: openai.OpenAI, image: bytes, mask: bytes | None = None, **fields: Any) -> np.ndarray:
    """What the official client gets."""
    model, more = fields.pop("model", "base"), {} if mask is None else {"mask": mask}
    answer = client.images.edit(image=image, prompt="", model=model, extra_body={"seed": 3} | fields, **more)
    assert answer.data is not None
    return pixels(answer.data[0].b64_json)


def test_the_official_client_fills_a_mask_and_the_rest_stays_as_it_was(
    client: openai.OpenAI, backends: dict[str, SmallBackend]
) -> None:
    made = edited(client, file(PHOTO), file(white(HIDDEN)))
    np.testing.assert_array_equal(made[~HIDDEN], PHOTO[~HIDDEN])
    asked = Request(seed=3, image=file(PHOTO), mask=file(white(HIDDEN)), generator="diffusion")
    (expected,) = backends["base"].cascade.sample([asked])
    assert np.abs(made - expected).max() <= 1


def test_transparent_is_made_where_anything_is_transparent_and_white_is_made_where_nothing_is(client: openai.OpenAI):
    by_white = edited(client, file(PHOTO), file(white(HIDDEN)))
    by_transparency = edited(client, file(PHOTO), file(transparent(255 - PHOTO, HIDDEN)))
    in_the_image = edited(client, file(transparent(PHOTO, HIDDEN)))
    opaque = np.dstack([white(HIDDEN)] * 3 + [np.full_like(white(HIDDEN), 255)])
    by_opaque_white = edited(client, file(PHOTO), file(opaque))
    for other in (by_transparency, in_the_image, by_opaque_white):
        np.testing.assert_array_equal(by_white, other)


def test_a_larger_square_is_shrunk_and_nothing_of_what_goes_is_seen_in_what_stays(client: openai.OpenAI) -> None:
    hidden = np.zeros((64, 64), bool)
    hidden[17, 25] = True  # one pixel: all that its pixel of the model's would show is made
    large = np.kron(PHOTO, np.ones((8, 8, 1), np.uint8))
    made = edited(client, file(large), file(white(hidden)))
    kept = np.ones((SIDE, SIDE), bool)
    kept[2, 3] = False
    np.testing.assert_array_equal(made[kept], PHOTO[kept])
    other = large.copy()
    other[hidden] = 255 - other[hidden]
    np.testing.assert_array_equal(edited(client, file(other), file(white(hidden)))[kept], PHOTO[kept])


def test_half_a_mask_is_where_its_reader_says(client: openai.OpenAI) -> None:
    """Soft edges: half transparent is made, as half white is."""
    soft = np.where(HIDDEN, 100, 200).astype(np.uint8)
    made = edited(client, file(PHOTO), file(np.dstack([PHOTO, soft])))
    np.testing.assert_array_equal(made[~HIDDEN], PHOTO[~HIDDEN])
    assert (made[HIDDEN] != PHOTO[HIDDEN]).any()


@pytest.mark.parametrize("file_format", ["JPEG", "WEBP"])
def test_images_may_come_in_other_formats(client: openai.OpenAI, file_format: str) -> None:
    flat = np.full((SIDE, SIDE, 3), 77, np.uint8)
    made = edited(client, file(flat, file_format), file(white(HIDDEN)))
    assert np.abs(made[~HIDDEN].astype(int) - 77).max() <= 2


def test_each_task_of_an_image_to_image_model_is_answered(client: openai.OpenAI, backends: dict[str, SmallBackend]):
    mask = file(white(WIDE_HIDDEN))
    for task, image, given in [
        ("inpainting", WIDE, mask),
        ("uncropping", WIDE, mask),
        ("colorization", WIDE, None),
        ("jpeg", WIDE, None),
        ("super_resolution", WIDE[:8, :8].copy(), None),
    ]:
        made = edited(client, file(image), given, task=task, model="palette")
        asked = Request(task=task, image=file(image), mask=given, seed=3, generator="translate")
        (expected,) = backends["palette"].cascade.sample([asked])
        assert np.abs(made - expected).max() <= 1
    nameless = edited(client, file(WIDE), mask, model="palette")
    np.testing.assert_array_equal(nameless, edited(client, file(WIDE), mask, model="palette", task="inpainting"))


def test_a_model_of_one_task_does_it_to_a_transparent_image_too(tmp_path: Path) -> None:
    """Transparency stands for a mask, which coloring does not take, only where a mask is taken."""
    backend = SmallBackend(Cascade.load(write_palette(tmp_path, tasks=["colorization"])), name="colors")
    with serving(backend) as url:
        client, image = official(url), file(transparent(WIDE, WIDE_HIDDEN))
        made = edited(client, image, model="colors")
        np.testing.assert_array_equal(made, edited(client, image, model="colors", task="colorization"))


def test_settings_of_stages_come_in_json_or_in_fields(
    client: openai.OpenAI, address: str, backends: dict[str, SmallBackend]
) -> None:
    wanted = {"base": {"num_inference_steps": 2, "guidance_interval": [0.5, 2]}}
    of_client = edited(client, file(PHOTO), file(white(HIDDEN)), sampling={"base": {"num_inference_steps": 2}})
    assert backends["base"].jobs[-1].requests[0].sampling == (("base", "num_inference_steps", 2),)
    files = {"image": file(PHOTO), "mask": file(white(HIDDEN))}
    fields = {"model": "base", "seed": "3", "n": "2", "stream": "false", "sampling": json.dumps(wanted)}
    answer = HTTP.post(f"{address}/v1/images/edits", data=fields, files=files).json()
    assert [image["seed"] for image in answer["data"]] == [3, 4]
    stages = backends["base"].jobs[-1].requests[0].sampling
    assert stages == (("base", "num_inference_steps", 2), ("base", "guidance_interval", (0.5, 2)))
    assert of_client.shape == (SIDE, SIDE, 3)


def test_a_list_of_one_image_and_a_nameless_model_are_understood(
    client: openai.OpenAI, backends: dict[str, SmallBackend]
) -> None:
    with serving(backends["base"]) as url:
        answer = official(url).images.edit(
            image=[("a.png", file(PHOTO))], mask=file(white(HIDDEN)), prompt="", extra_body={"seed": 3}
        )
    np.testing.assert_array_equal(pixels(answer.data[0].b64_json), edited(client, file(PHOTO), file(white(HIDDEN))))


def test_a_stream_of_an_edit_has_its_own_events(client: openai.OpenAI) -> None:
    events = list(
        client.images.edit(
            image=file(PHOTO),
            mask=file(white(HIDDEN)),
            prompt="",
            model="base",
            stream=True,
            partial_images=2,
            extra_body={"seed": 3},
        )
    )
    assert [event.type for event in events] == ["image_edit.partial_image"] * 2 + ["image_edit.completed"]
    np.testing.assert_array_equal(pixels(events[-1].b64_json), edited(client, file(PHOTO), file(white(HIDDEN))))
    assert events[-1].usage.input_tokens_details.image_tokens == 1


def test_a_condition_comes_as_a_file_or_in_base64(address: str, backends: dict[str, SmallBackend]) -> None:
    depth = file(PHOTO)
    text = base64.b64encode(depth).decode()
    common = {"model": "depth", "seed": 3}
    plain = HTTP.post(f"{address}/v1/images/generations", json=common | {"condition": text}).json()["data"]
    address_of = HTTP.post(
        f"{address}/v1/images/generations", json=common | {"condition": f"data:image/png;base64,{text}"}
    ).json()["data"]
    assert plain == address_of
    (expected,) = backends["depth"].cascade.sample([Request(seed=3, condition=depth)])
    assert np.abs(pixels(plain[0]["b64_json"]).astype(int) - expected).max() <= 1
    files = {"image": file(PHOTO), "mask": file(white(np.ones_like(HIDDEN))), "condition": depth}
    filled = HTTP.post(f"{address}/v1/images/edits", data={"model": "depth", "seed": "3"}, files=files).json()["data"]
    assert np.abs(pixels(filled[0]["b64_json"]).astype(int) - expected).max() <= 1
