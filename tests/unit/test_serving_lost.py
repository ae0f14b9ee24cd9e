"""What a client is told when a process is lost with its request: to come back, in the API's form, and never 500."""

import asyncio
from collections.abc import Iterable
from unittest.mock import Mock

import pytest
from ray.exceptions import ActorDiedError
from starlette.applications import Starlette
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.testclient import TestClient

from components.configuration.usage import UsageError
from components.sampling.requests import Request
from components.serving import deployment
from components.serving.deployment import RayBackend
from components.serving.messages import Event, FinishedImage, ImageJob, Partial, Taken, Unavailable
from components.serving.middleware import middlewares
from tests.serving_backend import settings_of

JOB = ImageJob((Request(seed=1),))
PREVIEW, IMAGE = Partial(0, 0, "base", 2, b"png"), FinishedImage(0, b"png", "1")


class Handle:
    """A deployment's, whose replicas say what they are told to, one after another; and the answers of each call."""

    def __init__(self, *replicas: Iterable[Event | Taken | Exception]) -> None:
        self.replicas, self.canceled, self.make = list(replicas), 0, self

    def options(self, *, stream: bool) -> "Handle":
        assert stream
        return self

    def remote(self, job: ImageJob) -> "Handle":
        assert job is JOB
        self.said = iter(self.replicas.pop(0))
        return self

    async def __anext__(self) -> Event | Taken:
        event = next(self.said, StopAsyncIteration())
        if isinstance(event, Exception):
            raise event
        return event

    def cancel(self) -> None:
        self.canceled += 1


def events(handle: Handle) -> list[Event]:
    async def ask() -> list[Event]:
        return [event async for event in RayBackend(handle).make(JOB)]

    return asyncio.run(ask())


def test_a_job_whose_replica_died_before_it_showed_anything_goes_to_another():
    assert events(Handle([Taken(), ActorDiedError()], [Taken(), PREVIEW, IMAGE])) == [PREVIEW, IMAGE]


def test_a_job_is_given_to_no_third_replica():
    handle = Handle([ActorDiedError()], [Taken(), ActorDiedError()], [Taken(), IMAGE])
    with pytest.raises(Unavailable, match="lost on the way"):
        events(handle)
    assert len(handle.replicas) == 1


def test_a_job_that_showed_something_is_not_begun_again():
    handle = Handle([Taken(), PREVIEW, ActorDiedError()], [Taken(), IMAGE])
    with pytest.raises(Unavailable, match="lost on the way"):
        events(handle)
    assert len(handle.replicas) == 1


def test_who_goes_away_cancels_the_call():
    handle = Handle([Taken(), PREVIEW, IMAGE])

    async def ask() -> None:
        made = RayBackend(handle).make(JOB)
        assert await anext(made) == PREVIEW
        await made.aclose()

    asyncio.run(ask())
    assert handle.canceled == 1


async def said(request: HttpRequest) -> Response:
    """As the path says."""
    case = request.path_params["case"]
    if case == "api":
        return JSONResponse({"error": {"message": "the API's own"}}, 503, {"Retry-After": "7"})
    return PlainTextResponse("Internal Server Error", int(case))


async def silent(scope, receive, send) -> None:
    """What Serve's proxy does where the process that should answer is lost."""


def proxied(app) -> TestClient:
    for middleware in middlewares():
        app = middleware.cls(app, *middleware.args, **middleware.kwargs)
    return TestClient(app)


@pytest.mark.parametrize("status", ["500", "503"])
def test_an_error_of_the_proxy_is_one_of_the_api(status: str):
    check_lost(proxied(Starlette(routes=[Route("/{case}", said)])).get(f"/{status}"))


def test_silence_of_the_proxy_is_an_error_of_the_api():
    check_lost(proxied(silent).get("/v1/models"))


def check_lost(answer) -> None:
    assert answer.status_code == 503
    assert int(answer.headers["Retry-After"]) >= 1
    assert answer.json()["error"]["type"] == "server_error"
    assert "try again" in answer.json()["error"]["message"]


def test_before_there_is_an_application_its_health_is_503():
    answer = proxied(Starlette(routes=[Route("/{case}", said)])).get("/404")
    check_lost(answer)
    assert answer.json()["error"]["message"] == "the service is starting; try again in a moment"


def slow(times: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Lines of a start whose proxy comes after so many time-outs of Ray's, every second by Serve's end of the proxy."""
    late = [TimeoutError("Proxies not available after 60s."), ActorDiedError()] * times
    for name, part in {"serve": Mock(run=Mock(side_effect=[*late[:times], None])), "service": Mock()}.items():
        monkeypatch.setattr(deployment, name, part)
    lines: list[str] = []
    deployment.run_service(settings_of({"tiny": 0}), host="127.0.0.1", port=1, say=lines.append)
    return lines


def test_a_slow_proxy_is_waited_for_with_one_line(monkeypatch: pytest.MonkeyPatch):
    assert slow(0, monkeypatch) == []
    assert slow(3, monkeypatch) == ["Ray's proxy is slow to start beside other work: waiting for some minutes more"]


def test_a_proxy_that_never_comes_ends_in_one_line(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(UsageError, match="did not come: close other programs and start again") as caught:
        slow(99, monkeypatch)
    assert "\n" not in str(caught.value)


def test_what_the_api_answers_passes():
    client = proxied(Starlette(routes=[Route("/{case}", said), Route("/-/{case}", said)]))
    assert client.get("/api").json() == {"error": {"message": "the API's own"}}
    assert client.get("/api").headers["Retry-After"] == "7"
    assert client.get("/-/503").text == "Internal Server Error", "Serve's own health is read by Kubernetes"
