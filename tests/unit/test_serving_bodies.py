"""Bodies are read under a deadline and a count of their own: who sends slowly, or nothing, holds up nobody else."""

import asyncio
import base64
import json
import socket
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import ExitStack, contextmanager

import pytest
from fastapi.routing import APIRoute
from pydantic import ValidationError

from components.sampling.cascade import Cascade
from components.serving.app import build_app
from components.serving.messages import Event, ImageJob, ServiceError, check_json
from components.serving.middleware import EDITS, GENERATIONS, TAKE_BODIES
from components.serving.settings import Limits
from tests.serving_backend import HTTP, SmallBackend, sending, serving, settings_of
from tests.waiting import eventually

BODY = json.dumps({"label": 0}).encode()


@pytest.fixture
def cascade(backends: dict[str, SmallBackend]) -> Cascade:
    return backends["tiny"].cascade


class Patient(SmallBackend):
    """Makes images once it may."""

    may = False

    async def make(self, job: ImageJob) -> AsyncGenerator[Event]:
        self.working += 1
        try:
            while not self.may:
                await asyncio.sleep(0.01)
            async for event in super().make(job):
                yield event
        finally:
            self.working -= 1


@contextmanager
def service(backend: SmallBackend, **limits: float) -> Iterator[str]:
    with serving(backend, limits=Limits.model_validate(limits), batch_images=1) as url:
        yield url


def answer(connection: socket.socket) -> str:
    """All that is said until the connection is closed."""
    parts = []
    while part := connection.recv(2**16):
        parts.append(part)
    return b"".join(parts).decode()


def is_silent(connection: socket.socket) -> bool:
    """Whether nothing was said, and the connection is open."""
    connection.setblocking(False)
    try:
        connection.recv(1)
        return False
    except BlockingIOError:
        return True
    finally:
        connection.setblocking(True)
        connection.settimeout(20)


def test_every_route_that_takes_a_body_is_one_whose_body_is_counted(cascade: Cascade) -> None:
    app = build_app({"tiny": SmallBackend(cascade)}, settings_of({"tiny": 0}))
    routes = [route for route in app.routes if isinstance(route, APIRoute)]
    assert {route.path for route in routes if route.methods & {"POST", "PUT", "PATCH"}} == {*TAKE_BODIES}


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        *[(method, "/healthz", 405) for method in ("POST", "PUT", "DELETE")],
        *[("GET", path, 200) for path in ("/healthz", "/", "/v1/models")],
        *[("POST", path, 405) for path in ("/", "/page/main.js", "/v1/models")],
        ("HEAD", "/healthz", 200),
        ("PUT", GENERATIONS, 405),
        ("POST", "/nowhere", 404),
    ],
)
def test_no_other_address_waits_for_a_body(cascade: Cascade, method: str, path: str, status: int) -> None:
    with service(SmallBackend(cascade)) as url, sending(url, path=path, method=method) as given:
        assert given.recv(2**16).startswith(f"HTTP/1.1 {status} ".encode())


def test_a_body_that_says_it_is_too_large_is_not_waited_for(cascade: Cascade) -> None:
    with service(SmallBackend(cascade)) as url, sending(url, length=2**40) as given:
        assert answer(given).startswith("HTTP/1.1 413")


def test_who_sends_more_than_the_limit_reads_a_413_and_sees_no_reset(cascade: Cascade) -> None:
    size = 2**24  # more than any buffer on the way holds
    with service(SmallBackend(cascade), body_bytes=2**16) as url, sending(url, length=size) as given:
        given.sendall(b" " * size)
        assert answer(given).startswith("HTTP/1.1 413")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_a_million_fields_are_refused_in_milliseconds(encoding: str) -> None:
    body = json.dumps(dict.fromkeys(map(str, range(1_000_000)), 1)).encode(encoding)
    began = time.thread_time()
    with pytest.raises(ServiceError) as caught:
        check_json(body)
    assert caught.value.status == 413
    assert time.thread_time() - began < 0.3, "on a machine ten times as slow"
    check_json(json.dumps({"condition": base64.b64encode(bytes(2**20)).decode(), "prompt": "a {b} [c]"}).encode())


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        ({"body_seconds": 0.5}, "the body did not come within 0.5 s: send it again"),
        ({"body_pause_seconds": 0.5}, "the body did not come any further for 0.5 s: send it again"),
    ],
)
@pytest.mark.parametrize("data", [b"", b'{"label"'])
def test_a_body_that_never_comes_is_given_up_and_its_connection_closed(
    cascade: Cascade, limits: dict[str, float], words: str, data: bytes
) -> None:
    with service(SmallBackend(cascade), **limits) as url, sending(url, data) as given:
        said = answer(given)
    assert said.startswith("HTTP/1.1 408")
    assert json.loads(said.partition("\r\n\r\n")[2])["error"]["message"] == words


def test_where_all_places_are_taken_the_body_that_was_silent_longest_gives_way(cascade: Cascade) -> None:
    with service(SmallBackend(cascade), bodies=2) as url, ExitStack() as open_ones:
        first, second = (open_ones.enter_context(sending(url, path=path)) for path in (GENERATIONS, EDITS))
        for _ in range(3):
            assert HTTP.post(url + GENERATIONS, json={"label": 0}).status_code == 200, "one that comes at once has room"
            silent, second = (first, second), open_ones.enter_context(sending(url))
            said = answer(silent[0])
            assert said.startswith("HTTP/1.1 503")
            assert "retry-after: 1\r\n" in said.lower()
            assert "this one was the slowest" in said
            first = silent[1]


def test_the_bytes_of_all_bodies_that_are_read_have_a_limit(cascade: Cascade) -> None:
    limits = {"body_bytes": 2000, "bodies_bytes": 3000}
    with service(SmallBackend(cascade), **limits) as url, ExitStack() as open_ones:
        first = open_ones.enter_context(sending(url, b" " * 1800, length=1900))
        other = open_ones.enter_context(sending(url, b" " * 800, length=1900))
        assert eventually(lambda: is_silent(first))
        other.sendall(b" " * 800)
        assert answer(first).startswith("HTTP/1.1 503")
        assert is_silent(other)


def test_more_calls_than_can_be_taken_are_refused_and_others_taken_when_these_are_gone(cascade: Cascade) -> None:
    backend = Patient(cascade)
    with service(backend, waiting_images=1) as url, ExitStack() as open_ones:
        calls = settings_of({"tiny": 0}, limits=Limits(waiting_images=1), batch_images=1).calls
        for _ in range(calls):
            open_ones.enter_context(sending(url, BODY, length=len(BODY)))
        assert eventually(lambda: backend.working == calls)
        refused = HTTP.post(url + GENERATIONS, json={"label": 0})
        assert (refused.status_code, refused.headers["Retry-After"]) == (503, "1")
        assert HTTP.get(url + "/healthz").status_code == 200
        open_ones.close()
        assert eventually(lambda: backend.working == 0)
        backend.may = True
        assert HTTP.post(url + GENERATIONS, json={"label": 0}).status_code == 200


def test_limits_that_leave_no_room_for_one_body_are_refused() -> None:
    with pytest.raises(ValidationError, match="bodies_bytes must be at least body_bytes, 4096, not 2048"):
        Limits(body_bytes=4096, bodies_bytes=2048)


def test_a_place_is_free_again_when_its_client_goes_away(cascade: Cascade) -> None:
    with service(SmallBackend(cascade), bodies=1) as url:
        with sending(url):
            pass
        with sending(url) as given:
            assert is_silent(given)
            assert HTTP.get(url + "/healthz").status_code == 200
            assert is_silent(given)
