"""A registered cascade behind Ray Serve, asked by OpenAI's own client: what it makes, streams, refuses and gives up."""

import base64
import io
import select
import socket
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import numpy as np
import openai
import pytest
import ray
from openai import OpenAI
from PIL import Image

from components.sampling.cascade import Cascade
from components.sampling.requests import Request, read_settings
from components.serving.deployment import end_service, run_service
from components.serving.settings import Limits, ServedModel, ServiceSettings
from tests.conftest import free_port
from tests.served_models import CHAMPION, NAME, Registry, write_other_cascade
from tests.tiny_cascade import write_cascade
from tests.waiting import eventually

SLOW = {"steps": 50, "sampling": {"upsampler_16": {"num_inference_steps": 50}}}  # fields that OpenAI's API lacks
WAIT = 60  # seconds
IMAGES = ("POST /v1/images/generations", "POST /v1/images/edits")
PLACES = Limits().bodies


class Served(NamedTuple):
    client: OpenAI
    address: str
    registry: Registry
    first: Path  # the cascade of version 1
    second: Path


@pytest.fixture(scope="module")
def served(ray_cluster: None, empty_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Two models: a registered cascade, and its base alone."""
    home, port = tmp_path_factory.mktemp("serving"), free_port()
    first, second = write_cascade(home / "first"), write_other_cascade(home / "second")
    registry = Registry(home, empty_database)
    for key, folder in {"k1": first, "k2": second}.items():
        registry.register(folder, key=key)
    registry.promote("1")
    settings = ServiceSettings(
        models=(ServedModel(name="tiny", source=CHAMPION), ServedModel(name="base", source=str(first / "base"))),
        tracking=registry.uri,
        limits=Limits(waiting_images=4, seconds=120, body_seconds=600, body_pause_seconds=600),
        batch_images=2,
        poll_seconds=0.5,
        cpus=0.5,
    )
    run_service(settings, host="127.0.0.1", port=port)
    address = f"http://127.0.0.1:{port}"
    yield Served(OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0), address, registry, first, second)
    end_service()


def pixels(text: str | None) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text or ""))))


def near(a: np.ndarray, b: np.ndarray) -> bool:
    """Within one gray level."""
    return bool(np.abs(a.astype(int) - b).max() <= 1)


def test_the_served_cascade_makes_what_the_local_one_makes(served: Served):
    answer = served.client.images.generate(model="tiny", prompt="red apple", n=3, extra_body={"seed": 7})
    ours = Cascade.load(served.first).sample([Request(prompt="red apple", seed=7 + i) for i in range(3)])
    assert all(near(pixels(one.b64_json), image) for one, image in zip(answer.data or [], ours, strict=True))
    png = base64.b64decode((answer.data or [])[2].b64_json or "")
    expected = {"model": NAME, "version": "1", "prompt": "red apple", "seed": 9, "generator": "diffusion"}
    assert read_settings(png) == expected


def test_jobs_at_once_are_made_as_alone(served: Served):
    asked = [{"label": "food", "seed": 1}, {"seed": 2, "guidance_scale": 2}, {"seed": 3, "generator": "tokens"}]

    def ask(fields: dict) -> np.ndarray:
        prompt = "" if "label" in fields else "grey cat"
        answer = served.client.images.generate(model="tiny", prompt=prompt, extra_body=fields)
        return pixels((answer.data or [])[0].b64_json)

    with ThreadPoolExecutor(3) as pool:
        theirs = list(pool.map(ask, asked))
    ours = Cascade.load(served.first).sample(
        [
            Request(label="food", seed=1),
            Request(prompt="grey cat", seed=2, guidance_scale=2.0),
            Request(prompt="grey cat", seed=3, generator="tokens"),
        ]
    )
    assert all(near(a, b) for a, b in zip(theirs, ours, strict=True))


def test_a_stream_shows_previews_and_then_the_image(served: Served):
    stream = served.client.images.generate(
        model="tiny", prompt="red apple", stream=True, partial_images=3, extra_body={"seed": 7}
    )
    events = list(stream)
    assert [event.type for event in events] == ["image_generation.partial_image"] * 3 + ["image_generation.completed"]
    assert [getattr(event, "partial_image_index", None) for event in events] == [0, 1, 2, None]
    (ours,) = Cascade.load(served.first).sample([Request(prompt="red apple", seed=7)])
    assert near(pixels(events[-1].b64_json), ours)


def test_both_models_are_listed_and_each_is_asked_by_its_name(served: Served):
    assert [model.id for model in served.client.models.list()] == ["tiny", "base"]
    answer = served.client.images.generate(model="base", prompt="red apple", extra_body={"seed": 7})
    assert pixels((answer.data or [])[0].b64_json).shape == (8, 8, 3)
    with pytest.raises(openai.BadRequestError, match="it has diffusion"):
        served.client.images.generate(model="base", prompt="red apple", extra_body={"generator": "tokens"})


def test_what_the_model_refuses_is_the_client_s_fault(served: Served):
    with pytest.raises(openai.BadRequestError, match="unknown label 'cars': the classes are 0 animals"):
        served.client.images.generate(model="tiny", prompt="", extra_body={"label": "cars"})


def test_a_full_queue_is_refused_with_a_time_and_emptied_by_a_client_that_goes(served: Served):
    long = served.client.images.generate(
        model="tiny", prompt="red apple", n=16, stream=True, partial_images=3, extra_body=SLOW
    )
    next(iter(long))  # it is being made, and more of its images wait than may
    with pytest.raises(openai.RateLimitError, match="images wait already") as caught:
        served.client.images.generate(model="tiny", prompt="red apple", n=2)
    assert int(caught.value.response.headers["Retry-After"]) >= 1
    long.close()
    started = time.monotonic()
    while True:  # the one that went is noticed between two steps, not at once
        try:
            served.client.images.generate(model="tiny", prompt="red apple", n=2)
            break
        except openai.RateLimitError:
            assert time.monotonic() - started < WAIT
            time.sleep(0.1)
    assert measured("cascade_serve_requests", 'code="429"') >= 1
    assert measured("cascade_serve_requests", 'code="499"') >= 1
    assert measured("cascade_serve_images", 'generator="diffusion"') < 16 + 20, "the images of who went were made"


@pytest.mark.parametrize("sent", ["POST /healthz", "POST /", "PUT /page/main.js", "POST /v1/models", *IMAGES, "half"])
def test_three_hundred_bodies_that_never_come_hold_up_nobody(served: Served, sent: str):
    """Nor do three hundred headers that end half-way."""
    place = urlsplit(served.address)
    head = f"{sent} HTTP/1.1\r\nHost: {place.netloc}\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n"
    with ExitStack() as hanging:
        slow = [
            hanging.enter_context(socket.create_connection((place.hostname or "", place.port or 0), timeout=WAIT))
            for _ in range(300)
        ]
        for connection in slow:
            connection.sendall(head.encode() if sent != "half" else b"POST /v1/images/generations HT")
        for path in ("/healthz", "/"):
            assert urllib.request.urlopen(served.address + path, timeout=WAIT).status == 200
        assert served.client.images.generate(model="base", prompt="red apple", timeout=WAIT).data
        answered = select.poll()
        for connection in slow:
            answered.register(connection, select.POLLIN)
        if sent == "half":
            assert not answered.poll(0), "what is half a header hangs, and holds nothing but its connection"
        elif sent in IMAGES:
            assert eventually(lambda: len(answered.poll(0)) >= 300 - PLACES)
            assert len(answered.poll(0)) <= 300 - PLACES + 2, "the others still hang, and the answers above came"
        else:
            assert eventually(lambda: len(answered.poll(0)) == 300)


def measured(name: str, tags: str) -> float:
    """What Prometheus finds on this node, once it is there."""
    (port,) = {node["MetricsExportPort"] for node in ray.nodes() if node["Alive"]}
    deadline = time.monotonic() + WAIT
    while time.monotonic() < deadline:
        page = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10).read().decode()
        found = [line for line in page.splitlines() if line.startswith(f"ray_{name}") and tags in line]
        if found:
            return sum(float(line.rpartition(" ")[2]) for line in found)
        time.sleep(1)
    raise AssertionError(f"no {name} with {tags}")


def test_a_new_champion_answers_without_a_request_lost(served: Served):
    versions: list[str] = []
    ended = threading.Event()

    def ask() -> None:
        while not ended.is_set():
            answer = served.client.images.generate(model="tiny", prompt="red apple", extra_body={"seed": 7})
            versions.append(answer.version)  # type: ignore[attr-defined]

    with ThreadPoolExecutor(2) as pool:
        clients = [pool.submit(ask) for _ in range(2)]
        try:
            served.registry.promote("2")
            deadline = time.monotonic() + WAIT
            while "2" not in versions and time.monotonic() < deadline:
                time.sleep(0.1)
        finally:
            ended.set()
        for client in clients:
            client.result()
    assert versions[0] == "1"
    assert versions[-1] == "2"
    answer = served.client.images.generate(model="tiny", prompt="red apple", extra_body={"seed": 7})
    (ours,) = Cascade.load(served.second).sample([Request(prompt="red apple", seed=7)])
    assert near(pixels((answer.data or [])[0].b64_json), ours)
    served.registry.promote("1")
