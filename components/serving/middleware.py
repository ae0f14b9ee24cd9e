"""What every answer has: headers, a line in the log, and no trace of what failed."""

import logging
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from components.serving.errors import ServiceError

LOG = logging.getLogger("cascade.serving")
NOTES = "cascade.notes"  # in the scope of a request
POLICY = "; ".join(
    (
        *("default-src 'none'", "script-src 'self'", "style-src 'self'", "img-src 'self' data: blob:"),
        *("connect-src 'self'", "frame-ancestors 'none'", "base-uri 'none'", "form-action 'none'"),
    )
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}


@dataclass
class Notes:
    """What the log says of a request; a route fills in what it learns."""

    started: float = field(default_factory=time.monotonic)
    model: str = "-"
    images: int = 0
    status: int = 0


def notes_of(scope: Scope) -> Notes:
    return scope[NOTES]


def noted(app: ASGIApp) -> ASGIApp:
    """Give each answer its headers and each request its line in the log; a failure that nobody foresaw is a 500
    without a word of what was inside."""

    async def answered(scope: Scope, receive: Receive, send: Send) -> None:
        """The app, with notes of what it answers."""
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        notes = scope[NOTES] = Notes()

        async def send_noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                notes.status = message["status"]
                add_headers(message, is_api=scope["path"].startswith("/v1/"))
            await send(message)

        try:
            await app(scope, receive, send_noted)
        except ClientDisconnect:
            notes.status = 499
        except Exception as error:
            LOG.error("%s in %s", type(error).__name__, place_of(error))
            if notes.status == 0:
                await ServiceError(500, "the service failed; its log says where").response()(scope, receive, send_noted)
            notes.status = 500
        finally:
            log(scope, notes)

    return answered


def add_headers(message: Message, *, is_api: bool) -> None:
    headers = MutableHeaders(scope=message)
    for name, value in HEADERS.items():
        headers.setdefault(name, value)
    if is_api:
        headers.setdefault("Cache-Control", "no-store")


def log(scope: Scope, notes: Notes) -> None:
    """One line; an address that is none of the service's own is not repeated."""
    route: Any = scope.get("route")
    path, seconds = getattr(route, "path", "-"), time.monotonic() - notes.started
    words = (scope["method"], path, notes.status or 499, seconds, notes.model, notes.images)
    LOG.info("%s %s %d %.3f s model=%s images=%d", *words)


def place_of(error: Exception) -> str:
    """File and line where it was raised, without folders."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{Path(frame.filename).name}:{frame.lineno}"
