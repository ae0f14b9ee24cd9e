"""What can't be met is refused in one sentence: every case of the table, and whatever else anybody may send."""

import base64
import io
import json
import random
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from components.sampling.requests import Request
from components.serving.api_models import EditForm, Generation
from components.serving.messages import CODES, param_of
from tests.serving_backend import HTTP, SmallBackend, serving
from tests.serving_bad_input import CASES, EDITS, GENERATIONS, KEY, LIMITS, Bad, asked, form, png
from tests.serving_documents import COMMAND, SERVING, serving_text

FORMATS = ("png", "jpeg", "webp")
FIELDS = sorted({*Generation.model_fields, *EditForm.model_fields} - {"stream"})
TEXTS = st.text(st.characters(), max_size=20) | st.sampled_from(
    ["auto", "64x64", "1e3", "-1", "null", "\ud800", "9" * 400]
)
NUMBERS = st.integers(-(2**70), 2**70) | st.floats() | st.sampled_from([0, 1, 2, 10**300])
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS | st.just("base"), inner, max_size=3),
    max_leaves=8,
)


@pytest.mark.parametrize(
    ("setting", "fields", "wanted"),
    [
        ("base.copy", {}, "sampling"),  # a method of every request
        ("base.seed", {"seed": 3}, "sampling"),
        ("base.guidance_interval.0", {}, "sampling"),
        ("base.num_inference_steps", {"steps": 3}, "steps"),
        ("base.guidance_scale", {"guidance_scale": 2.0, "classifier_scale": 3.0}, "guidance_scale"),
        ("classifier.guidance_scale", {"guidance_scale": 2.0, "classifier_scale": 3.0}, "classifier_scale"),
        ("reranker.candidates", {"best_of": 3}, "best_of"),
    ],
)
def test_the_field_of_a_refused_setting_is_the_one_that_the_client_sent(
    setting: str, fields: dict[str, Any], wanted: str
) -> None:
    assert param_of(f"{setting}: Input should be less", Request(**fields)) == wanted


@pytest.fixture(scope="module")
def addresses(backends: dict[str, SmallBackend]) -> Iterator[dict[str, str]]:
    """Of a service without keys, and one with."""
    models = backends.values()
    with serving(*models, limits=LIMITS) as open_url, serving(*models, limits=LIMITS, keys=[KEY]) as keyed_url:
        yield {"open": open_url, "keyed": keyed_url}


@pytest.mark.parametrize("bad", CASES, ids=lambda bad: bad.name)
def test_what_cannot_be_met_is_answered_as_the_table_says(addresses: dict[str, str], bad: Bad) -> None:
    answer = HTTP.request(bad.method, addresses[bad.service] + bad.path, **bad.sent)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (bad.status, bad.param), error
    expected, goes_on = bad.message.removesuffix("…"), bad.message.endswith("…")
    assert error["message"].startswith(expected) if goes_on else error["message"] == expected
    assert "\n" not in error["message"]
    assert error["type"] == CODES[bad.status][0]


def test_the_same_without_what_is_bad_is_answered(addresses: dict[str, str]) -> None:
    """Or the cases might be refused for something else."""
    assert HTTP.post(addresses["open"] + GENERATIONS, **asked()).status_code == 200
    assert HTTP.post(addresses["open"] + EDITS, **form()).status_code == 200
    key = {"Authorization": f"Bearer {KEY}"}
    assert HTTP.post(addresses["keyed"] + GENERATIONS, headers=key, **asked()).status_code == 200


def test_the_table_of_the_documents_is_that_of_the_test() -> None:
    assert SERVING.read_text() == serving_text(), f"renew it with: {COMMAND}"
    assert len(CASES) >= 50
    assert len({bad.name for bad in CASES}) == len(CASES)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(fields=st.dictionaries(st.sampled_from(FIELDS) | TEXTS, VALUES, max_size=4))
def test_no_json_ends_in_a_failure(addresses: dict[str, str], fields: dict[str, Any]) -> None:
    few = {"steps": 1} if "steps" not in fields else {}
    body = encoded({"model": "tiny", "label": 0} | few | fields)
    answer = HTTP.post(addresses["open"] + GENERATIONS, content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code in (200, 400, 404), answer.text
    if answer.status_code != 200:
        assert answer.json()["error"]["message"]


def encoded(value: object) -> bytes:
    """JSON as Python writes it, half characters too."""
    return json.dumps(value).encode()


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    fields=st.dictionaries(st.sampled_from(FIELDS) | st.just("sampling[base][eta]"), st.text(max_size=12), max_size=4)
)
def test_no_form_ends_in_a_failure(addresses: dict[str, str], fields: dict[str, str]) -> None:
    readable = {name: value.encode("utf-8", "replace").decode() for name, value in fields.items()}
    answer = HTTP.post(addresses["open"] + EDITS, **form(**{"steps": "1"} | readable))
    assert answer.status_code in (200, 400, 404), answer.text


@pytest.mark.parametrize("file_format", FORMATS)
def test_no_damaged_image_ends_in_a_failure(addresses: dict[str, str], file_format: str) -> None:
    draw, file = random.Random(file_format), io.BytesIO()
    Image.effect_noise((8, 8), 90).convert("RGB").save(file, format=file_format)
    for _ in range(40):
        data = bytearray(file.getvalue())
        for _ in range(draw.choice((1, 2, 8))):
            data[draw.randrange(len(data))] = draw.randrange(256)
        cut = draw.randrange(1, len(data) + 1) if draw.random() < 0.3 else len(data)
        answer = HTTP.post(addresses["open"] + EDITS, **form(image=bytes(data[:cut]), steps="1"))
        assert answer.status_code in (200, 400, 413), answer.text


def test_no_damaged_form_ends_in_a_failure(addresses: dict[str, str]) -> None:
    draw = random.Random(1)
    head = b'--x\r\nContent-Disposition: form-data; name="%s"; filename="a.png"\r\nContent-Type: image/png\r\n\r\n'
    body = b"".join(head % name + png(8, 8, "white") + b"\r\n" for name in (b"image", b"mask"))
    body += b'--x\r\nContent-Disposition: form-data; name="model"\r\n\r\nbase\r\n--x--\r\n'
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    assert HTTP.post(addresses["open"] + EDITS, content=body, headers=headers).status_code == 200
    for _ in range(100):
        data = bytearray(body)
        for _ in range(draw.choice((1, 3))):
            data[draw.randrange(len(data))] = draw.randrange(256)
        answer = HTTP.post(addresses["open"] + EDITS, content=bytes(data), headers=headers)
        assert answer.status_code in (200, 400, 404, 413), answer.text


def test_a_condition_is_as_hard_to_break_as_an_upload(addresses: dict[str, str]) -> None:
    for data in (png(300, 300), b"no image"):
        condition = base64.b64encode(data).decode()
        answer = HTTP.post(addresses["open"] + GENERATIONS, **asked(model="depth", label=None, condition=condition))
        assert answer.json()["error"]["param"] == "condition"
        assert answer.status_code in (400, 413)
