"""Laws of streams: previews, then the image that no stream would change; and who goes away is waited for by nobody."""

import base64
import io
import json
import time

import numpy as np
import openai
import pytest
from PIL import Image

from components.sampling.cascade import Cascade
from components.sampling.image_files import gray_png
from components.serving.messages import FinishedImage, Partial, Refused, Unavailable
from components.serving.middleware import GENERATIONS
from components.serving.settings import Limits
from tests.serving_backend import HTTP, SmallBackend, ToldBackend, official, pixels, sending, serving
from tests.waiting import eventually

ASKED = {"model": "tiny", "prompt": "red apple", "extra_body": {"seed": 7, "label": "food"}}


@pytest.fixture
def cascade(backends: dict[str, SmallBackend]) -> Cascade:
    return backends["tiny"].cascade


def test_the_official_client_sees_previews_and_then_the_image_itself(client: openai.OpenAI) -> None:
    events = list(client.images.generate(stream=True, partial_images=3, **ASKED))
    assert [event.type for event in events] == ["image_generation.partial_image"] * 3 + ["image_generation.completed"]
    assert [event.partial_image_index for event in events[:-1]] == [0, 1, 2]
    assert [(event.stage, event.step, event.size) for event in events[:2]] == [("base", 1, "8x8"), ("base", 2, "8x8")]
    assert len({event.b64_json for event in events}) == 4
    last, plain = events[-1], client.images.generate(**ASKED)
    np.testing.assert_array_equal(pixels(last.b64_json), pixels(plain.data[0].b64_json))
    assert (last.seed, last.image_index, last.version, last.size) == (7, 0, "3", "16x16")
    assert last.usage.model_dump() == plain.usage.model_dump()


def test_several_images_have_each_their_own_events_and_the_usage_adds_up(client: openai.OpenAI) -> None:
    events = list(client.images.generate(stream=True, partial_images=2, n=2, **ASKED))
    plain = client.images.generate(n=2, **ASKED)
    for number in (0, 1):
        own = [event for event in events if event.image_index == number]
        assert [getattr(event, "partial_image_index", None) for event in own] == [0, 1, None]
        assert {event.seed for event in own} == {7 + number}
        np.testing.assert_array_equal(pixels(own[-1].b64_json), pixels(plain.data[number].b64_json))
    assert sum(event.usage.total_tokens for event in events if hasattr(event, "usage") and event.usage) == (
        plain.usage.total_tokens
    )


@pytest.mark.parametrize("asked", [{}, {"partial_images": 0}, {"partial_images": 3, "generator": "tokens"}])
def test_without_previews_the_image_is_the_only_event(client: openai.OpenAI, asked: dict) -> None:
    events = list(client.images.generate(stream=True, **(ASKED | {"extra_body": ASKED["extra_body"] | asked})))
    assert [event.type for event in events] == ["image_generation.completed"]


def test_previews_come_in_the_format_of_the_image(client: openai.OpenAI) -> None:
    events = list(client.images.generate(stream=True, partial_images=1, output_format="webp", **ASKED))
    formats = [Image.open(io.BytesIO(base64.b64decode(event.b64_json))).format for event in events]
    assert formats == ["WEBP", "WEBP"]


def test_previews_come_while_the_image_is_made(cascade: Cascade) -> None:
    slow = SmallBackend(cascade, step_seconds=0.1)
    with serving(slow) as url:
        own = official(url)
        times = [time.monotonic() for _ in own.images.generate(stream=True, partial_images=1, **ASKED)]
    assert times[1] - times[0] > 0.3, "of nine steps of a tenth of a second"


@pytest.mark.parametrize(
    ("told", "code", "message"),
    [
        ([Unavailable("the model was lost; try again")], "unavailable", "the model was lost; try again"),
        ([Refused(429, "8 images wait", 4)], "rate_limit_exceeded", "8 images wait"),
        ([], "unavailable", "the model stopped before its images were made; try again"),
        (
            [FinishedImage(1, gray_png(8), "3")],
            "unavailable",
            "the model stopped before its images were made; try again",
        ),
    ],
)
def test_what_goes_wrong_on_the_way_is_the_last_event(cascade: Cascade, told: list, code: str, message: str) -> None:
    backend = ToldBackend(cascade, Partial(0, 0, "base", 1, gray_png(8)), *told)
    with serving(backend) as url:
        asked = {"label": 0, "n": 2, "stream": True, "partial_images": 1}
        answer = HTTP.post(url + GENERATIONS, json=asked)
        own = official(url)
        with pytest.raises(openai.APIError, match=message):
            list(own.images.generate(model="tiny", prompt="", n=2, stream=True, extra_body={"label": 0}))
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/event-stream")
    name, data = answer.text.strip().split("\n\n")[-1].split("\n")
    assert name == "event: error"
    error = json.loads(data.removeprefix("data: "))
    assert (error["type"], error["error"]["code"], error["error"]["message"]) == ("error", code, message)


def test_time_runs_out_in_a_stream_too(cascade: Cascade) -> None:
    slow = SmallBackend(cascade, step_seconds=0.2)
    with serving(slow, limits=Limits(seconds=0.7)) as url:
        answer = HTTP.post(url + GENERATIONS, json={"label": 0, "stream": True, "partial_images": 1})
    assert answer.text.count("event: ") == 2
    assert "event: error" in answer.text
    assert "was not ready within 0.7 s" in answer.text
    assert '"code":"timeout"' in answer.text
    assert slow.left


@pytest.mark.parametrize(
    ("stream", "after"), [(False, "the request"), (True, "the request"), (True, "the first event")]
)
def test_a_client_that_goes_away_is_noticed_and_its_job_canceled(cascade: Cascade, stream: bool, after: str) -> None:
    slow = SmallBackend(cascade, step_seconds=60 if after == "the request" else 0.5)
    with serving(slow) as url:
        body = json.dumps({"label": 0, "stream": stream, "partial_images": 1 if stream else 0}).encode()
        connection = sending(url, body, length=len(body))
        if after == "the first event":
            assert b"partial_image" in connection.recv(2**16)
        assert eventually(lambda: slow.working)
        connection.close()
        assert eventually(lambda: slow.left)
        assert eventually(lambda: not slow.working)
        slow.step_seconds = 0
        assert HTTP.post(url + GENERATIONS, json={"label": 0}).status_code == 200, "others are answered"
        assert len(slow.left) == 1
