"""An HTTP proxy that stands between a client and an object store and does to the traffic what networks do.

As a program: `python -m tests.faults.proxy TARGET PORT --log FILE --seed N --gap 4 10 --hang 6`. Of the requests that
read, and of those that write, every few one is hurt, the faults in turn from a shuffled deck, so that each kind comes
as often as the others. Every injection is a line in the log.

An S3 server compares what arrives with the sha256 that the client signed; moto does not, so the proxy answers in its
place where it has changed the bytes on their way in. Clients of other stores sign no bytes and leave that to TLS:
`--tls` stands for it, and leaves no bytes wrong.
"""

import argparse
import asyncio
import hashlib
import json
import random
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import yarl
from aiohttp import web

FAULTS = ("503", "500", "reset", "lost answer", "time-out", "slow body", "truncated body", "wrong bytes")
OVER_TLS = tuple(fault for fault in FAULTS if fault != "wrong bytes")
NEED_BODY = ("slow body", "truncated body", "wrong bytes")
WRITES = ("PUT", "POST", "DELETE")
ERRORS = {
    "503": (503, "SlowDown", "Please reduce your request rate."),
    "500": (500, "InternalError", "We encountered an internal error. Please try again."),
    "mismatch": (400, "XAmzContentSHA256Mismatch", "The provided 'x-amz-content-sha256' header does not match."),
}
SLOW_PIECES = 5


class Deck:
    """When which fault is next: a function of the seed and of the number of requests."""

    def __init__(self, seed: int, gap: tuple[int, int], faults: tuple[str, ...]) -> None:
        self.numbers, self.gap, self.faults = random.Random(seed), gap, faults
        self.cards: list[str] = []
        self.wait = self.numbers.randint(*gap)

    def draw(self, *, has_body: bool) -> str | None:
        self.wait -= 1
        if self.wait > 0:
            return None
        if not self.cards:
            self.cards = self.numbers.sample(self.faults, len(self.faults))
        if self.cards[-1] in NEED_BODY and not has_body:
            return None  # the next request that has one
        self.wait = self.numbers.randint(*self.gap)
        return self.cards.pop()


class Proxy:
    def __init__(self, target: str, *, log: Path, seed: int, gap: tuple[int, int], hang: float, tls: bool) -> None:
        self.target, self.log, self.hang = target, log, hang
        faults = OVER_TLS if tls else FAULTS
        self.decks = {"read": Deck(seed, gap, faults), "write": Deck(seed + 1, gap, faults)}
        self.numbers = random.Random(seed + 2)

    async def handle(self, request: web.Request) -> web.StreamResponse:
        if request.path == "/alive":
            return web.Response()
        kind = "write" if request.method in WRITES else "read"
        return await (self.write(request) if kind == "write" else self.read(request))

    async def read(self, request: web.Request) -> web.StreamResponse:
        answer = await self.pass_on(request, await request.read())
        body = answer.body if isinstance(answer.body, bytes) else b""
        fault = self.draw("read", request, has_body=bool(body) and request.method == "GET" and answer.status < 300)
        if fault in ERRORS:
            return error(fault)
        if fault in ("reset", "lost answer"):
            return await self.cut(request)
        if fault == "time-out":
            await asyncio.sleep(self.hang)
            return await self.cut(request)
        if fault == "wrong bytes":
            answer.body = self.hurt(body)
        if fault in ("slow body", "truncated body"):
            return await self.drip(request, answer, body, whole=fault == "slow body")
        return answer

    async def write(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        fault = self.draw("write", request, has_body=len(body) > 1)
        if fault in ERRORS:
            return error(fault)
        if fault == "reset":
            return await self.cut(request)
        if fault == "wrong bytes":
            wrong, signed = self.hurt(body), request.headers.get("x-amz-content-sha256")
            assert signed == hashlib.sha256(body).hexdigest(), "the client signs what it sends"
            return error("mismatch") if hashlib.sha256(wrong).hexdigest() != signed else web.Response()
        if fault == "truncated body":
            await self.pass_on(request, body, keep=len(body) // 2)
            return await self.cut(request)
        if fault == "slow body":
            await asyncio.sleep(self.hang / 4)
        answer = await self.pass_on(request, body)
        if fault == "time-out":
            await asyncio.sleep(self.hang)
        return await self.cut(request) if fault in ("lost answer", "time-out") else answer

    def draw(self, kind: str, request: web.Request, *, has_body: bool) -> str | None:
        fault = self.decks[kind].draw(has_body=has_body)
        if fault is not None:
            line = {"kind": kind, "fault": fault, "method": request.method, "path": request.path}
            with open(self.log, "a") as file:
                file.write(json.dumps(line) + "\n")
        return fault

    def hurt(self, body: bytes) -> bytes:
        """One bit of it is another."""
        place = self.numbers.randrange(len(body))
        return body[:place] + bytes([body[place] ^ (1 << self.numbers.randrange(8))]) + body[place + 1 :]

    async def pass_on(self, request: web.Request, body: bytes, *, keep: int | None = None) -> web.Response:
        """What the server says to this request. `keep`: break off after so many bytes of it."""
        headers = request.headers.copy()
        headers.popall("Transfer-Encoding", None)
        headers["Content-Length"] = str(len(body))
        content = body if keep is None else broken(body[:keep])
        url = yarl.URL(self.target + request.raw_path, encoded=True)
        try:
            async with (
                aiohttp.ClientSession(auto_decompress=False, skip_auto_headers=["Content-Type"]) as session,
                session.request(request.method, url, headers=headers, data=content, allow_redirects=False) as answer,
            ):
                kept = answer.headers.copy()
                length = kept.popall("Content-Length", ["0"])[0]
                kept.popall("Transfer-Encoding", None)
                if request.method == "HEAD":
                    kept["Content-Length"] = length
                return web.Response(status=answer.status, headers=kept, body=await answer.read())
        except aiohttp.ClientError:
            if keep is None:
                raise
            return web.Response(status=400)

    async def drip(self, request: web.Request, answer: web.Response, body: bytes, *, whole: bool) -> web.StreamResponse:
        """The body in pieces with pauses between; half of it and then nothing, unless `whole`."""
        response = web.StreamResponse(status=answer.status, headers=answer.headers)
        response.headers["Content-Length"] = str(len(body))
        await response.prepare(request)
        if not whole:
            await response.write(body[: len(body) // 2])
            return await self.cut(request)
        step = len(body) // SLOW_PIECES + 1
        for start in range(0, len(body), step):
            await response.write(body[start : start + step])
            await asyncio.sleep(self.hang / 4 / SLOW_PIECES)
        await response.write_eof()
        return response

    async def cut(self, request: web.Request) -> web.Response:
        if request.transport is not None:
            request.transport.abort()
        return web.Response()


async def broken(part: bytes) -> AsyncIterator[bytes]:
    yield part
    raise aiohttp.ClientPayloadError("broken off on purpose")


def error(name: str) -> web.Response:
    status, code, message = ERRORS[name]
    text = f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>{message}</Message></Error>'
    return web.Response(status=status, text=text, content_type="application/xml")


def counted(log: Path) -> dict[tuple[str, str], int]:
    """(read or write, fault) -> times injected."""
    counts: dict[tuple[str, str], int] = {}
    for line in log.read_text().splitlines() if log.exists() else []:
        entry = json.loads(line)
        counts[entry["kind"], entry["fault"]] = counts.get((entry["kind"], entry["fault"]), 0) + 1
    return counts


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("target")
    parser.add_argument("port", type=int)
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--gap", type=int, nargs=2, default=(4, 10))
    parser.add_argument("--hang", type=float, default=6.0)
    parser.add_argument("--tls", action="store_true")
    given = parser.parse_args()
    proxy = Proxy(given.target, log=given.log, seed=given.seed, gap=tuple(given.gap), hang=given.hang, tls=given.tls)
    app = web.Application(client_max_size=2**30)
    app.router.add_route("*", "/{path:.*}", proxy.handle)
    web.run_app(app, host="127.0.0.1", port=given.port, print=None, access_log=None)


if __name__ == "__main__":
    main()
