"""Who may ask: API keys, compared in constant time; without them, this machine's own programs and no other page."""

import hashlib
import hmac
import ipaddress
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from components.serving.errors import ServiceError

VARIABLE, FILE_VARIABLE = "CASCADE_API_KEYS", "CASCADE_API_KEYS_FILE"
OPEN = ("/", "/healthz")  # these and what is below /page/ hold nothing that a key protects


def read_keys(environment: Mapping[str, str]) -> tuple[str, ...]:
    """The keys that the environment, or the file that it names, holds: by commas or on lines of their own.

    Raises ValueError, in one line and without a key in it, for a file that can't be read or a key that no header can
    carry.
    """
    texts = [environment.get(VARIABLE, "")]
    if place := environment.get(FILE_VARIABLE):
        try:
            texts.append(Path(place).read_text())
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{FILE_VARIABLE}: the file can't be read ({type(error).__name__})") from None
    keys = tuple(key for text in texts for part in re.split(r"[,\n]", text) if (key := part.strip()))
    if any(not re.fullmatch(r"[!-~]+", key) for key in keys):
        raise ValueError(f"{VARIABLE}: a key must be of letters, digits and signs of ASCII, without spaces")
    return keys


def keys_here() -> tuple[str, ...]:
    """Those of this process: keys are read where they are compared, and never sent to another. Raises ValueError."""
    return read_keys(os.environ)


def gate(app: ASGIApp, *, keys: Iterable[str]) -> ASGIApp:
    """Let those through who may ask; a key is asked for where there is one."""
    digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers, path = Headers(scope=scope), scope["path"].removeprefix(scope.get("root_path", ""))
            is_open = path in OPEN or path.startswith("/page/")
            error = key_error(headers, digests, is_open=is_open) if digests else visitor_error(headers, is_open=is_open)
            if error is not None:
                await error.response()(scope, receive, send)
                return
        await app(scope, receive, send)

    return guarded


def key_error(headers: Headers, digests: Iterable[bytes], *, is_open: bool) -> ServiceError | None:
    """Why a request has no right to an answer, by its key."""
    scheme, _, given = headers.get("authorization", "").partition(" ")
    digest = hashlib.sha256(given.strip().encode()).digest()
    # Every key is looked at, so that the time says nothing of which one was nearly right.
    fits = [hmac.compare_digest(digest, known) for known in digests]
    if is_open or (scheme.lower() == "bearer" and any(fits)):
        return None
    if not given:
        return ServiceError(401, "this service needs a key: send the header Authorization: Bearer KEY")
    return ServiceError(401, "this key is not known here: ask whoever runs the service for one")


def visitor_error(headers: Headers, *, is_open: bool) -> ServiceError | None:
    """Why a request to a service without keys has no right to an answer: a name that an attacker made point here
    (DNS rebinding), or a page of somebody else in the browser of this machine."""
    hosts = headers.getlist("host")
    if len(hosts) != 1 or not is_loopback(hosts[0]):
        return ServiceError(403, "without a key this service answers to localhost and 127.0.0.1 alone")
    origin, site = headers.get("origin"), headers.get("sec-fetch-site", "none")
    foreign = origin is not None and urlsplit(origin).netloc.lower() != hosts[0].lower()
    if not is_open and (foreign or site in ("cross-site", "same-site")):
        return ServiceError(403, "without a key this service answers no page but its own")
    return None


def is_loopback(host: str) -> bool:
    """Whether a Host header names this machine to itself."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
