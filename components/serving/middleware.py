"""ASGI middleware: headers and log, keys, bodies under limits, the proxy's answer for a lost process.

`RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=image_cascade.components.serving.middleware:middlewares`, in the environment
that Ray is started in, puts `always_answered` into Ray Serve's proxy (the one in Python: HAProxy runs no callbacks).
"""

import asyncio
import logging
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from python_multipart.multipart import parse_options_header
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from components.serving.keys import Keyring
from components.serving.messages import NO_KEY, ServiceError, check_json
from components.serving.settings import Limits, is_loopback

LOG = logging.getLogger("cascade.serving")
NOTES = "cascade.notes"  # in the scope of a request
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
OPEN = ("/", "/healthz")  # these and what is below /page/ hold nothing that a key protects
GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"
TAKE_BODIES = (GENERATIONS, EDITS)  # all others are answered without a look at what is sent with them
GAVE_WAY = "too many uploads at once, and this one was the slowest: send it again"
CUT_OFF = "the upload is cut off before its end: send it again"
FULL = "too many requests at once: try again in a moment"
LOST = ServiceError(503, "the service lost this request on the way; try again in a moment", retry_after=1)
STARTING = ServiceError(503, "the service is starting; try again in a moment", retry_after=1)
REST_SECONDS = 2.0  # of silence, after which nothing more is taken of a body that was refused


@dataclass
class Notes:
    """Facts of a request for the line in the log; filled in by the routes."""

    started: float = field(default_factory=time.monotonic)
    model: str = "-"
    images: int = 0
    key: str = NO_KEY  # its name
    status: int = 0


def noted(app: ASGIApp) -> ASGIApp:
    """Adds the strict headers to every answer and a line of the log to every request.
    A failure that nobody foresaw becomes a 500 without a word of what was inside; the log has its type and place."""

    async def answered(scope: Scope, receive: Receive, send: Send) -> None:
        """Calls the app, and notes facts of the answer."""
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        notes = scope[NOTES] = Notes()

        async def send_noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                notes.status, headers = message["status"], MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
                # A new version of the service has a new page at once, so browsers ask again for what they hold.
                headers.setdefault("Cache-Control", "no-store" if scope["path"].startswith("/v1/") else "no-cache")
            await send(message)

        try:
            await app(scope, receive, send_noted)
        except ClientDisconnect:
            notes.status = 499
        except Exception as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            LOG.error("%s in %s:%s", type(error).__name__, Path(frame.filename).name, frame.lineno)
            if notes.status == 0:
                await ServiceError(500, "the service failed; its log says where").response()(scope, receive, send_noted)
            notes.status = 500
        finally:
            path = getattr(scope.get("route"), "path", "-")  # no foreign address is repeated
            words = (scope["method"], path, notes.status or 499, time.monotonic() - notes.started)
            LOG.info("%s %s %d %.3f s model=%s images=%d key=%s", *words, notes.model, notes.images, notes.key)

    return answered


def gate(app: ASGIApp, *, keys: Keyring) -> ASGIApp:
    """Refuses requests without a valid key or, if there are no keys at the start, from other machines."""
    is_keyed = bool(keys)  # for good: a service whose last key was taken away answers nobody

    async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            path = scope["path"].removeprefix(scope.get("root_path", ""))
            is_open = path in OPEN or path.startswith("/page/")
            headers = Headers(scope=scope)
            if is_keyed:
                name, error = key_holder(headers, keys)
                scope[NOTES].key, error = name or NO_KEY, None if is_open else error
            else:
                error = visitor_error(headers, is_open=is_open)
            if error is not None:
                await error.response()(scope, receive, send)
                return
        await app(scope, receive, send)

    return guarded


def key_holder(headers: Headers, keys: Keyring) -> tuple[str | None, ServiceError | None]:
    """Returns the name of a request's key; else the error for a missing or unknown key."""
    scheme, _, key = headers.get("authorization", "").partition(" ")
    name = keys.name_of(key.strip())
    if name is not None and scheme.lower() == "bearer":
        return name, None
    remedy = "this key is not known here: ask whoever runs the service for one"
    remedy = remedy if key else "this service needs a key: send the header Authorization: Bearer KEY"
    return None, ServiceError(401, remedy)


def visitor_error(headers: Headers, *, is_open: bool) -> ServiceError | None:
    """Returns the error for a visitor of a service without keys who is no program of this machine.
    Such a visitor comes by another name for this machine (DNS rebinding), or from another site's page in a browser."""
    hosts = headers.getlist("host")
    if len(hosts) != 1 or not is_loopback(hosts[0]):
        return ServiceError(403, "without a key this service answers to localhost and 127.0.0.1 alone")
    origin, site = headers.get("origin"), headers.get("sec-fetch-site", "none")
    is_foreign = origin is not None and urlsplit(origin).netloc.lower() != hosts[0].lower()
    if not is_open and (is_foreign or site in ("cross-site", "same-site")):
        return ServiceError(403, "without a key this service answers no page but its own")
    return None


def limited(app: ASGIApp, *, limits: Limits, calls: int) -> ASGIApp:
    """Reads bodies under the limits, and answers at most `calls` requests with a body at a time."""
    bodies, answering = Bodies(limits), 0

    async def reading(scope: Scope, receive: Receive, send: Send) -> None:
        """Calls the app, with a body that is already read."""
        nonlocal answering
        is_whole, path = False, scope.get("path", "").removeprefix(scope.get("root_path", ""))
        if scope["type"] != "http" or scope["method"] != "POST" or path not in TAKE_BODIES:
            await app(scope, receive, send)
            return
        try:
            headers = Headers(scope=scope)
            length = headers.get("content-length", "0")
            body = await bodies.read(receive, declared=int(length) if length.isdecimal() else 0)
            if body is None:
                return
            is_whole = True
            kind, options = parse_options_header(headers.get("content-type", ""))
            if kind != b"multipart/form-data":
                check_json(body)
            elif (end := options.get(b"boundary")) and b"--%s--" % end not in body:
                raise ServiceError(400, CUT_OFF)  # the parser would leave the last part out without a word
            if answering >= calls:
                raise ServiceError(503, FULL, retry_after=1)
        except ServiceError as error:
            if error.status == 413 and not is_whole:
                await refuse(error, receive, send, seconds=limits.body_seconds)
            else:
                await error.response({"Connection": "close"})(scope, receive, send)
            return
        replay: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive_again() -> Message:
            return replay.pop() if replay else await receive()

        answering += 1
        try:
            await app(scope, receive_again, send)
        finally:
            answering -= 1

    return reading


async def refuse(error: ServiceError, receive: Receive, send: Send, *, seconds: float) -> None:
    """Answers at once, and then takes what is still sent, until it pauses or `seconds` are over.
    A connection that is closed on a client that still sends is a reset, in which the answer is lost."""
    response = error.response({"Connection": "close"})
    await send({"type": "http.response.start", "status": error.status, "headers": response.raw_headers})
    await send({"type": "http.response.body", "body": response.body, "more_body": True})
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            while (await asyncio.wait_for(receive(), REST_SECONDS)).get("more_body"):
                pass
    await send({"type": "http.response.body", "body": b""})


class Bodies:
    """Bodies on the way: each under a deadline and of a limited size, a limited number at a time.
    Where all places are taken, the body that waits longest for its next piece gives way."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._sizes: dict[asyncio.Timeout, int] = {}  # bytes by patience; the last heard of is last

    async def read(self, receive: Receive, *, declared: int) -> bytes | None:
        """Returns a whole body, of `declared` bytes; None if the client went away before the body's end.
        Raises ServiceError for one that is too large, too slow, or gave way to others."""
        limits, loop, body = self._limits, asyncio.get_running_loop(), bytearray()
        self._check_size(declared)
        deadline = loop.time() + limits.body_seconds
        patience = asyncio.timeout_at(deadline)
        try:
            async with patience:
                while True:
                    self._sizes.pop(patience, None)
                    self._sizes[patience] = len(body)
                    self._make_room()
                    patience.reschedule(min(deadline, loop.time() + limits.body_pause_seconds))
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    body += message.get("body", b"")
                    self._check_size(len(body))
                    if not message.get("more_body", False):
                        return bytes(body)
        except TimeoutError:
            if patience not in self._sizes:
                raise ServiceError(503, GAVE_WAY, retry_after=1) from None
            within = f"within {limits.body_seconds:g} s"
            if loop.time() < deadline:
                within = f"any further for {limits.body_pause_seconds:g} s"
            raise ServiceError(408, f"the body did not come {within}: send it again") from None
        finally:
            self._sizes.pop(patience, None)

    def _check_size(self, size: int) -> None:
        if size > self._limits.body_bytes:
            raise ServiceError(413, f"the body must have at most {self._limits.body_bytes} bytes: send smaller images")

    def _make_room(self) -> None:
        """Ends the wait for the most silent bodies, until the rest fits."""
        while len(self._sizes) > self._limits.bodies or sum(self._sizes.values()) > self._limits.bodies_bytes:
            silent = next(iter(self._sizes))
            del self._sizes[silent]
            silent.reschedule(0)


def middlewares() -> list[Middleware]:
    """Returns the middleware for Ray Serve's proxy, around all answers."""
    return [Middleware(always_answered)]


def always_answered(app: ASGIApp) -> ASGIApp:
    """Answers 503 in the API's form where the proxy has no answer, its own error, or no application."""

    async def proxied(scope: Scope, receive: Receive, send: Send) -> None:
        """Calls the app, and answers where it does not."""
        if scope["type"] != "http" or scope["path"].startswith("/-/"):  # Ray Serve's own health and routes
            await app(scope, receive, send)
            return
        is_started, is_replaced = False, False

        async def send_answered(message: Message) -> None:
            nonlocal is_started, is_replaced
            if message["type"] == "http.response.start":
                kind = Headers(raw=list(message.get("headers", ()))).get("content-type", "")
                is_started, is_early = True, message["status"] == 404
                is_replaced = (message["status"] >= 500 or is_early) and not kind.startswith("application/json")
                if is_replaced:  # the API's own errors are JSON
                    await (STARTING if is_early else LOST).response()(scope, receive, send)
            if not is_replaced:
                await send(message)

        await app(scope, receive, send_answered)
        if not is_started:
            await LOST.response()(scope, receive, send)

    return proxied
