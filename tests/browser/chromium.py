"""A headless Chromium that is driven over its DevTools protocol; real pages, no driver package."""

import asyncio
import base64
import json
import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import aiohttp

FLAGS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--remote-debugging-port=0",
    "about:blank",
]
SECONDS = 60


class Visit(NamedTuple):
    """What one page did while it was open, and what it answered."""

    answers: list[Any]  # of the expressions, in their order
    requests: list[str]  # URLs that the page asked for, itself first; `data:` left out
    complaints: list[str]  # errors and warnings of the console, and exceptions
    screenshot: bytes  # PNG of the whole page


def find_chromium() -> str | None:
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def visit(url: str, *, width: int, dark: bool = False, expressions: Sequence[str] = ()) -> Visit:
    """Open a page at a width in pixels, evaluate JavaScript expressions in it, and close it. Raises TimeoutError."""
    return asyncio.run(asyncio.wait_for(_visit(url, width, dark, expressions), SECONDS))


async def _visit(url: str, width: int, dark: bool, expressions: Sequence[str]) -> Visit:
    async with Browser() as page:
        for domain in ("Page", "Runtime", "Log", "Network"):
            await page.send(f"{domain}.enable")
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        await page.send("Emulation.setEmulatedMedia", features=[scheme])
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        await page.send("Emulation.setDeviceMetricsOverride", **metrics)
        await page.send("Page.navigate", url=url)
        await page.event("Page.loadEventFired")
        answers = [await page.evaluate(expression) for expression in expressions]
        shot = await page.send("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        return Visit(answers, page.requests(), page.complaints(), base64.b64decode(shot["data"]))


class Browser:
    """One process with one page."""

    async def __aenter__(self) -> "Browser":
        self.folder = tempfile.mkdtemp(prefix="chromium-")
        program = find_chromium()
        assert program is not None
        self.process = await asyncio.create_subprocess_exec(
            program, f"--user-data-dir={self.folder}", *FLAGS, stderr=asyncio.subprocess.PIPE
        )
        self.session = aiohttp.ClientSession()
        port = await self._port()
        async with self.session.get(f"http://127.0.0.1:{port}/json") as answer:
            page = next(target for target in await answer.json() if target["type"] == "page")
        self.socket = await self.session.ws_connect(page["webSocketDebuggerUrl"], max_msg_size=0)
        self.events: list[dict[str, Any]] = []
        self.number = 0
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.session.close()
        self.process.kill()
        await self.process.wait()
        shutil.rmtree(Path(self.folder), ignore_errors=True)

    async def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        self.number += 1
        await self.socket.send_json({"id": self.number, "method": method, "params": parameters})
        while True:
            message = json.loads((await self.socket.receive()).data)
            if message.get("id") == self.number:
                assert "error" not in message, message
                return message["result"]
            self.events.append(message)

    async def event(self, method: str) -> None:
        while not any(event["method"] == method for event in self.events):
            self.events.append(json.loads((await self.socket.receive()).data))

    async def evaluate(self, expression: str) -> Any:
        result = await self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def requests(self) -> list[str]:
        sent = [e["params"]["request"]["url"] for e in self.events if e["method"] == "Network.requestWillBeSent"]
        return [url for url in sent if not url.startswith("data:")]

    def complaints(self) -> list[str]:
        found = []
        for event in self.events:
            if event["method"] == "Runtime.exceptionThrown":
                found.append(event["params"]["exceptionDetails"]["text"])
            elif event["method"] == "Log.entryAdded" and event["params"]["entry"]["level"] in ("error", "warning"):
                found.append(event["params"]["entry"]["text"])
            elif event["method"] == "Runtime.consoleAPICalled" and event["params"]["type"] in ("error", "warning"):
                found.append(str(event["params"]["args"]))
        return found

    async def _port(self) -> str:
        assert self.process.stderr is not None
        while line := await self.process.stderr.readline():
            if found := re.search(r"DevTools listening on ws://127\.0\.0\.1:(\d+)/", line.decode()):
                self._drain = asyncio.create_task(self.process.stderr.read())  # a full pipe would stop the browser
                return found[1]
        raise RuntimeError("Chromium ended before it listened")
