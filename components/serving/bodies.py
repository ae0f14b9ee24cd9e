"""Bodies of requests, read before anything is done for them: under a deadline, so many at a time, of a limited size.

A client that sends slowly holds a place here and nowhere else. Where all places are taken, the body that waits longest
for its next piece gives way: one that comes as fast as its line allows is never that one, however many others hang.
"""

import asyncio

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from components.serving.errors import ServiceError
from components.serving.settings import Limits

GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"
TAKE_BODIES = (GENERATIONS, EDITS)  # all others are answered without a look at what is sent with them
GAVE_WAY = "too many uploads at once, and this one was the slowest: send it again"
FULL = "too many requests at once: try again in a moment"


def limited(app: ASGIApp, *, limits: Limits, calls: int) -> ASGIApp:
    """Read bodies here, and let `calls` requests that have one be answered at a time."""
    bodies, answering = Bodies(limits), 0

    async def reading(scope: Scope, receive: Receive, send: Send) -> None:
        """The app, with a body that is there already."""
        nonlocal answering
        path = scope.get("path", "").removeprefix(scope.get("root_path", ""))
        if scope["type"] != "http" or scope["method"] != "POST" or path not in TAKE_BODIES:
            await app(scope, receive, send)
            return
        try:
            declared = Headers(scope=scope).get("content-length", "0")
            body = await bodies.read(receive, declared=int(declared) if declared.isdecimal() else 0)
            if answering >= calls:
                raise ServiceError(503, FULL, retry_after=1)
        except ServiceError as error:
            await error.response({"Connection": "close"})(scope, receive, send)
            return
        if body is None:
            return
        answering += 1
        try:
            await app(scope, again(body, receive), send)
        finally:
            answering -= 1

    return reading


class Bodies:
    """The bodies that are being read."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._sizes: dict[asyncio.Timeout, int] = {}  # bytes, by the patience with a body; last who was heard of last

    async def read(self, receive: Receive, *, declared: int) -> bytes | None:
        """A whole body; None if the client went away before its end.

        Args:
            declared: bytes that the client says it will send.

        Raises ServiceError for one that is too large, too slow, or gave way to others.
        """
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
        """End the wait for those that were silent longest, until the others fit."""
        while len(self._sizes) > self._limits.bodies or sum(self._sizes.values()) > self._limits.bodies_bytes:
            silent = next(iter(self._sizes))
            del self._sizes[silent]
            silent.reschedule(0)


def again(body: bytes, receive: Receive) -> Receive:
    """Returns a receiver that replays the body and then passes on the messages after it."""
    first: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def give() -> Message:
        return first.pop() if first else await receive()

    return give
