"""A PNG says how it was made, whatever the prompt; settings are one thing in a PNG, a command, a row and a request."""

import json
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import PngImagePlugin
from pydantic import ValidationError

from components.sampling.image_files import encode_png, gray_png, open_image
from components.sampling.requests import (
    HEADER,
    KEYWORD,
    MOST_TEXT,
    Request,
    RequestRow,
    nested_settings,
    read_settings,
    request_of,
    settings_of,
    stage_settings,
    with_settings,
)
from pipelines.command.loading import parsed_settings
from tests.refusals import one_line

IMAGE = np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8)
PNG = encode_png(IMAGE)

numbers = st.floats(allow_nan=False)
words = st.text(st.characters(), max_size=20)  # every character that there is, halves of pairs too
values = st.none() | st.booleans() | st.integers() | numbers | words
settings = values | st.lists(values | st.lists(values, max_size=2), max_size=3)
stages = st.dictionaries(words, st.dictionaries(words, settings, min_size=1, max_size=3), max_size=3)
maybe = st.none() | numbers
counts = st.none() | st.integers(min_value=0)
requests = st.builds(
    Request,
    label=st.none() | words | st.integers(min_value=0),
    prompt=st.none() | words,
    seed=st.integers(),
    condition=st.none(),
    image=st.none(),
    mask=st.none(),
    task=st.none() | words,
    generator=st.none() | words,
    guidance_scale=maybe,
    steps=counts,
    temperature=maybe,
    top_k=counts,
    top_p=maybe,
    best_of=counts,
    size=st.none() | st.tuples(st.integers(min_value=0), st.integers(min_value=0)),
    sampler=st.none() | words,
    classifier_scale=maybe,
    truncation=maybe,
    sampling=stages.map(stage_settings),
)


@given(requests, words, st.none() | words)
def test_a_request_comes_back_from_a_png(request_: Request, model: str, version: str | None) -> None:
    png = with_settings(PNG, settings_of(request_, model=model, version=version))
    found = read_settings(png)
    assert found is not None
    assert (found["model"], found.get("version")) == (model, version)
    again = request_of(found)
    assert again == request_
    assert [type(value) for _, value in again] == [
        type(value) for _, value in request_
    ]  # 1 == True == 1.0, which are not the same setting
    np.testing.assert_array_equal(np.array(open_image(png)), IMAGE)


def test_every_byte_but_the_settings_is_as_it_was() -> None:
    png = with_settings(PNG, {"prompt": "красное сердце ❤"})
    added = len(png) - len(PNG)
    assert png[:HEADER] + png[HEADER + added :] == PNG
    assert open_image(png).info[KEYWORD].isascii()
    assert read_settings(PNG) is None


def test_images_of_a_request_are_named_and_not_kept() -> None:
    image = gray_png(8)
    asked = Request(prompt="red", image=image, mask=image, condition=image, task="inpainting")
    found = settings_of(asked, model="photos", version=None)
    assert found["needs"] == ["image", "mask", "condition"]
    assert request_of(found) == asked.replace(image=None, mask=None, condition=None)
    assert "needs" not in settings_of(Request(), model="photos", version=None)


def test_settings_are_read_where_an_editor_kept_them_in_another_chunk() -> None:
    for international in (True, False):
        about = PngImagePlugin.PngInfo()
        add = about.add_itxt if international else about.add_text
        add(KEYWORD, json.dumps({"seed": 3}), zip=True)
        encoded = encode_png(IMAGE)
        for number, data, *_ in about.chunks:
            body = number + data
            chunk = struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))
            encoded = encoded[:HEADER] + chunk + encoded[HEADER:]
        assert read_settings(encoded) == {"seed": 3}


def chunk_of(kind: bytes, data: bytes, *, length: int | None = None) -> bytes:
    size = struct.pack(">I", len(data) if length is None else length)
    return PNG[:HEADER] + size + kind + data + struct.pack(">I", zlib.crc32(kind + data)) + PNG[HEADER:]


BOMB = KEYWORD.encode() + b"\0\0" + zlib.compress(b" " * 2**26)
HOSTILE = {
    "nothing": b"",
    "text": b"hello",
    "the signature alone": PNG[:8],
    "half a header": PNG[:20],
    "a chunk longer than the file": chunk_of(b"tEXt", b"parameters\0{}", length=2**31 - 1),
    "another program's words": chunk_of(b"tEXt", b"parameters\0red heart, steps: 20"),
    "broken JSON": chunk_of(b"tEXt", b'parameters\0{"seed": '),
    "a list": chunk_of(b"tEXt", b"parameters\0[1]"),
    "deep JSON": chunk_of(b"tEXt", b"parameters\0" + b"[" * 500_000),
    "a number of a million digits": chunk_of(b"tEXt", b"parameters\0" + b"1" * 1_000_000),
    "long settings": chunk_of(b"tEXt", b'parameters\0{"prompt": "' + b"a" * MOST_TEXT + b'"}'),
    "settings that unpack to 64 MiB": chunk_of(b"zTXt", BOMB),
    "another kind of image": b"GIF89a\x01\x00\x01\x00\x00\xff\x00,\x00\x00\x00\x00\x01\x00\x01\x00\x00\x02\x00;",
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_what_has_no_settings_of_ours_is_one_line(kind: str) -> None:
    with one_line(ValueError, match=r"PNG") as caught:
        read_settings(HOSTILE[kind])
    assert len(str(caught.value)) < 200


@given(st.data())
def test_a_damaged_png_is_read_or_refused(data: st.DataObject) -> None:
    png = bytearray(with_settings(PNG, {"prompt": "red heart", "seed": 3}))
    for _ in range(data.draw(st.integers(1, 4))):
        png[data.draw(st.integers(0, len(png) - 1))] = data.draw(st.integers(0, 255))
    try:
        read_settings(bytes(png[: data.draw(st.integers(0, len(png)))]))
    except ValueError:
        return  # and no other error


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"colour": "red"}, "that this version does not know: 'colour'"),
        ({"image": "aGVsbG8="}, "that this version does not know: 'image'"),
        ({"steps": "many"}, "the PNG says steps 'many': Input should be a valid integer"),
        ({"seed": 1.5}, "the PNG says seed 1.5"),
        ({"size": "large"}, "size large: write it as WIDTHxHEIGHT"),
        ({"sampling": 3}, "sampling must be such as"),
        ({"sampling": {"base": {"eta": {}}}}, "a sampling setting is"),
    ],
)
def test_settings_that_are_no_request_are_one_line(wrong: dict, words: str) -> None:
    with one_line(ValueError, match=words):
        request_of(wrong)


def test_a_row_with_a_field_that_no_request_has_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"promt\n  Extra inputs are not permitted"):
        RequestRow(promt="a red heart")


def test_settings_are_kept_in_a_png_alone() -> None:
    with pytest.raises(ValueError, match="in a PNG, and this is none"):
        with_settings(b"\xff\xd8\xff", {})


NESTED = {"base": {"eta": 0.5, "guidance_interval": [0.2, 5.0], "spacing": None}, "upsampler_64": {"noise_level": 20}}
FROZEN = (
    ("base", "eta", 0.5),
    ("base", "guidance_interval", (0.2, 5.0)),
    ("base", "spacing", None),
    ("upsampler_64", "noise_level", 20),
)


def test_a_command_a_row_and_nested_settings_say_the_same() -> None:
    written = ["base.eta=0.5", "base.guidance_interval=[0.2, 5.0]", "base.spacing=null", "upsampler_64.noise_level=20"]
    assert parsed_settings(written) == stage_settings(NESTED) == FROZEN
    assert RequestRow(sampling=json.dumps(NESTED)).request().sampling == FROZEN
    assert hash(FROZEN) == hash(stage_settings(nested_settings(FROZEN)))


def test_the_last_of_a_setting_counts() -> None:
    assert parsed_settings(["base.eta=0.5", "base.eta=1"]) == (("base", "eta", 1),)


def test_a_row_of_a_request_asks_for_it_with_its_settings_and_what_is_zero() -> None:
    request = Request(label="0", sampling=FROZEN, guidance_scale=0.0, classifier_scale=0.0, temperature=0.0)
    assert RequestRow.of(request).request() == request


@pytest.mark.parametrize("wrong", ["base", ["base"], {"base": 3}, {"base": {"eta": {"a": 1}}}, {"base": {"eta": [{}]}}])
def test_settings_of_another_form_are_one_line(wrong: object) -> None:
    with one_line(ValueError, match=r"^(sampling must be such as|a sampling setting is)"):
        RequestRow(sampling=json.dumps(wrong)).request()


@pytest.mark.parametrize("text", ["[1", "2020-01-01", "!!set {a}"])
def test_a_value_that_no_stage_could_take_is_one_line(text: str) -> None:
    with one_line(ValueError, match=r"^(--set 'base.eta=|a sampling setting is)"):
        parsed_settings([f"base.eta={text}"])
