"""Pages in the machine's own Chromium, driven by Playwright."""

import shutil
from collections.abc import Sequence
from typing import Any, NamedTuple

from playwright.sync_api import ConsoleMessage, sync_playwright

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking", "--hide-scrollbars"]
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
    requests: list[str] = []
    complaints: list[str] = []

    def listen(message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            complaints.append(message.text)

    with sync_playwright() as driver, driver.chromium.launch(executable_path=find_chromium(), args=FLAGS) as browser:
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme="dark" if dark else "light")
        page.set_default_timeout(1000 * SECONDS)
        page.on("request", lambda request: requests.append(request.url))
        page.on("console", listen)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(url)
        answers = [page.evaluate(expression) for expression in expressions]
        asked = [request for request in requests if not request.startswith("data:")]
        return Visit(answers, asked, complaints, page.screenshot(full_page=True))
