"""Laws of the service's HTTP: OpenAI's client works unchanged, and each image is the one that sampling makes."""

import asyncio
import base64
import io
import json
import logging
import re
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import openai
import pytest
from PIL import Image

from components.sampling.image_files import encode_png
from components.sampling.requests import Request
from components.serving.messages import Card, FinishedImage, ImageJob, Refused, Unavailable
from components.serving.middleware import GENERATIONS
from components.serving.settings import Limits
from tests.serving_backend import HTTP, SmallBackend, ToldBackend, pixels, serving
from tests.serving_documents import COMMAND, OPENAPI, openapi_text
from tests.waiting import eventually

ASKED = {"model": "tiny", "prompt": "red apple", "extra_body": {"seed": 7, "label": "food"}}


def test_the_official_client_gets_the_images_that_sampling_makes(
    client: openai.OpenAI, backends: dict[str, SmallBackend]
) -> None:
    answer = client.images.generate(n=2, size="auto", **ASKED)
    asked = Request(label="food", prompt="red apple", generator="diffusion")
    expected = backends["tiny"].cascade.sample([asked.replace(seed=7), asked.replace(seed=8)])
    assert answer.data is not None
    assert [image.seed for image in answer.data] == [7, 8]
    for image, made in zip(answer.data, expected, strict=True):
        assert np.abs(pixels(image.b64_json) - made).max() <= 1
    assert (answer.model, answer.version, answer.size, answer.output_format) == ("tiny", "3", "16x16", "png")


def test_what_openai_has_and_this_service_has_no_use_for_changes_nothing(client: openai.OpenAI) -> None:
    plain = client.images.generate(**ASKED)
    ignored = {"quality": "high", "background": "auto", "moderation": "low", "style": "vivid", "user": "me"}
    ignored |= {"response_format": "b64_json", "size": "16x16", "output_format": "png", "safety_identifier": "me"}
    assert client.images.generate(n=1, **ignored, **ASKED).data == plain.data


def test_a_seed_that_nobody_names_is_drawn_told_and_makes_the_same_image_again(client: openai.OpenAI) -> None:
    first, second = (client.images.generate(model="tiny", prompt="red").data for _ in range(2))
    assert first[0].seed != second[0].seed
    again = client.images.generate(model="tiny", prompt="red", extra_body={"seed": first[0].seed}).data
    assert again == first


def test_every_option_of_a_request_reaches_the_model(address: str, backends: dict[str, SmallBackend]) -> None:
    settings = {"upsampler_16": {"noise_level": 3, "guidance_interval": [0.5, 2]}}
    common = {"label": 2, "seed": -4, "n": 2, "guidance_scale": 2}
    diffusion = common | {"generator": "diffusion", "steps": 3, "sampler": "ddim", "sampling": settings, "prompt": " "}
    tokens = common | {"generator": "tokens", "temperature": 0.5, "top_k": 3, "top_p": 0.5, "best_of": 2}
    for fields in (diffusion, tokens):
        assert HTTP.post(address + GENERATIONS, json=fields | {"model": "tiny"}).status_code == 200
    made, drawn = backends["tiny"].jobs[-2:]
    stages = (("upsampler_16", "noise_level", 3), ("upsampler_16", "guidance_interval", (0.5, 2)))
    asked = Request(label=2, seed=-4, generator="diffusion", steps=3, sampler="ddim", guidance_scale=2, sampling=stages)
    assert made == ImageJob((asked, asked.replace(seed=-3)))
    assert drawn.requests[0] == Request(
        label=2, seed=-4, generator="tokens", guidance_scale=2, temperature=0.5, top_k=3, top_p=0.5, best_of=2
    )


def test_a_size_is_width_by_height(client: openai.OpenAI) -> None:
    wide = {"label": "food"}
    answer = client.images.generate(model="tokens", prompt="", size="24x16", extra_body=wide)
    assert answer.size == "24x16"
    assert pixels(answer.data[0].b64_json).shape == (16, 24, 3)


@pytest.mark.parametrize("output_format", ["jpeg", "webp"])
def test_images_come_in_the_format_and_quality_that_are_asked_for(client: openai.OpenAI, output_format) -> None:
    fine, coarse = (
        client.images.generate(output_format=output_format, output_compression=quality, **ASKED).data[0].b64_json
        for quality in (100, 10)
    )
    assert Image.open(io.BytesIO(base64.b64decode(fine))).format == output_format.upper()
    assert len(coarse) < len(fine)
    made = pixels(client.images.generate(**ASKED).data[0].b64_json)
    assert np.abs(pixels(fine) - made).mean() < np.abs(pixels(coarse) - made).mean() < 60


def test_usage_is_what_its_definition_says(client: openai.OpenAI) -> None:
    usage = client.images.generate(n=3, **ASKED).usage
    assert usage is not None
    assert usage.input_tokens_details.text_tokens == 3 * 3, "red apple: nine bytes, four a token"
    assert usage.output_tokens == 3 * 1, "16x16 pixels are a patch"
    assert (usage.input_tokens, usage.total_tokens) == (9, 12)


def test_models_are_listed_with_what_they_can_do(client: openai.OpenAI, backends: dict[str, SmallBackend]) -> None:
    listed = client.models.list().data
    assert [model.id for model in listed] == list(backends)
    card = client.models.retrieve("tiny").card
    assert [generator["name"] for generator in card["generators"]] == ["diffusion", "tokens"]
    assert card["generators"][0]["classes"] == ["animals", "food", "flags"]
    assert card["generators"][0]["sampling"]["upsampler_16"]["noise_level"] == 5
    with pytest.raises(openai.NotFoundError, match="no model 'gpt' is served here"):
        client.models.retrieve("gpt")


@pytest.mark.parametrize(
    ("told", "status", "retry_after", "message"),
    [
        ([Refused(429, "64 images wait: try again in 9 s", 9)], 429, "9", "64 images wait: try again in 9 s"),
        ([Refused(400, "unknown label 9")], 400, None, "unknown label 9"),
        (
            [Unavailable("the model was lost on the way; try again")],
            503,
            "1",
            "the model was lost on the way; try again",
        ),
        ([], 503, "1", "the model stopped before its images were made; try again"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_job_that_is_not_done_is_answered_once_with_the_time_to_try_again(
    backends: dict[str, SmallBackend], told, status, retry_after, message, stream
) -> None:
    backend = ToldBackend(backends["tiny"].cascade, *told)
    with serving(backend) as url:
        answer = HTTP.post(url + GENERATIONS, json={"label": 0, "stream": stream})
    assert (answer.status_code, answer.headers.get("Retry-After")) == (status, retry_after)
    assert answer.json()["error"]["message"] == message


def test_a_model_that_is_away_is_missed_by_its_own_clients_alone(backends: dict[str, SmallBackend]) -> None:
    away = ToldBackend(backends["tiny"].cascade, name="away", away=True)
    with serving(away, backends["tiny"]) as url:
        assert [model["id"] for model in HTTP.get(url + "/v1/models").json()["data"]] == ["tiny"]
        lost = HTTP.post(url + GENERATIONS, json={"model": "away", "label": 0})
        assert (lost.status_code, lost.headers["Retry-After"]) == (503, "1")
        assert HTTP.post(url + GENERATIONS, json={"model": "tiny", "label": 0}).status_code == 200
        assert HTTP.get(url + "/healthz").json() == {"status": "ok"}


def test_images_that_take_too_long_are_given_up(backends: dict[str, SmallBackend]) -> None:
    slow = SmallBackend(backends["tiny"].cascade, step_seconds=30)
    with serving(slow, limits=Limits(seconds=0.5)) as url:
        answer = HTTP.post(url + GENERATIONS, json={"label": 0})
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
    assert answer.json()["error"]["code"] == "timeout"
    assert answer.json()["error"]["message"].startswith("the image was not ready within 0.5 s")
    assert slow.left, "the job was canceled"


def test_a_failure_that_nobody_foresaw_says_nothing_of_what_was_inside(
    backends: dict[str, SmallBackend], caplog: pytest.LogCaptureFixture
) -> None:
    backend = ToldBackend(backends["tiny"].cascade, RuntimeError("a prompt, and /a/path"))
    with caplog.at_level(logging.INFO), serving(backend) as url:
        answer = HTTP.post(url + GENERATIONS, json={"label": 0, "prompt": "red"})
    assert answer.status_code == 500
    assert answer.json()["error"]["message"] == "the service failed; its log says where"
    words = answer.text + caplog.text
    assert "a prompt" not in words
    assert "/a/path" not in words
    assert "Traceback" not in words
    assert "RuntimeError in serving_backend.py:" in caplog.text


def request_lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "cascade.serving"]


def test_a_request_is_a_line_of_the_log_without_prompt_or_key(address: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="cascade.serving"):
        headers = {"Authorization": "Bearer secret"}
        HTTP.post(address + GENERATIONS, json={"model": "tiny", "prompt": "red", "n": 2}, headers=headers)
        HTTP.get(address + "/etc/secret%0Aline")
        assert eventually(lambda: len(request_lines(caplog)) == 2)  # written after the answer was sent
    lines = request_lines(caplog)
    assert re.fullmatch(r"POST /v1/images/generations 200 \d+\.\d{3} s model=tiny images=2 key=-", lines[0])
    assert re.fullmatch(r"GET - 404 \d+\.\d{3} s model=- images=0 key=-", lines[1])


def test_every_answer_has_strict_headers(address: str) -> None:
    for answer in (HTTP.get(address + "/healthz"), HTTP.get(address + "/nowhere"), HTTP.get(address + "/v1/models")):
        assert answer.headers["Content-Security-Policy"].startswith("default-src 'none'; script-src 'self'")
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["Referrer-Policy"] == "no-referrer"
    assert answer.headers["Cache-Control"] == "no-store"


def test_a_new_version_is_seen_within_the_time_between_looks(backends: dict[str, SmallBackend]) -> None:
    backend = SmallBackend(backends["tiny"].cascade)
    with serving(backend, poll_seconds=0.01) as url:
        versions = []
        for version in ("3", "4"):
            backend.version = version
            versions.append(HTTP.post(url + GENERATIONS, json={"label": 0}).json()["version"])
            assert HTTP.get(url + "/v1/models/tiny").json()["card"]["version"] == version
    assert versions == ["3", "4"]


class SlowCardBackend(SmallBackend):
    asked = 0

    async def card(self) -> Card:
        self.asked += 1
        await asyncio.sleep(0.5)
        return await super().card()


def test_many_at_once_ask_a_model_once_what_it_can_do(backends: dict[str, SmallBackend]) -> None:
    backend = SlowCardBackend(backends["tiny"].cascade)
    with serving(backend) as url, ThreadPoolExecutor(8) as threads:
        ask = partial(HTTP.post, url + GENERATIONS)
        answers = list(threads.map(lambda seed: ask(json={"label": 0, "seed": seed}), range(8)))
    assert [answer.status_code for answer in answers] == [200] * 8
    assert [answer.json()["data"][0]["seed"] for answer in answers] == list(range(8))
    assert backend.asked == 1


def test_images_that_are_ready_in_another_order_come_in_that_of_their_seeds(backends: dict[str, SmallBackend]) -> None:
    pngs = [encode_png(np.full((2, 2, 3), level, np.uint8)) for level in range(3)]
    backend = ToldBackend(backends["tiny"].cascade, *[FinishedImage(number, pngs[number], "3") for number in (1, 2, 0)])
    with serving(backend) as url:
        data = HTTP.post(url + GENERATIONS, json={"label": 0, "n": 3, "seed": 5}).json()["data"]
    assert [(image["seed"], int(pixels(image["b64_json"]).max())) for image in data] == [(5, 0), (6, 1), (7, 2)]


def test_the_committed_description_is_that_of_the_service(address: str) -> None:
    assert OPENAPI.read_text() == openapi_text(), f"renew it with: {COMMAND}"
    described = HTTP.get(address + "/openapi.json").json()
    assert described == json.loads(OPENAPI.read_text())
    assert described["openapi"].startswith("3.1")
    for name in set(re.findall(r'"#/components/schemas/(\w+)"', OPENAPI.read_text())):
        assert name in described["components"]["schemas"]
    assert "$defs" not in OPENAPI.read_text()
