"""Pages in the machine's own Chromium, driven by Playwright."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from playwright.sync_api import Browser, ConsoleMessage, Page, sync_playwright

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking", "--hide-scrollbars"]
LAPTOP, PHONE = {"width": 1366, "height": 768}, {"width": 390, "height": 844}


class Opened(NamedTuple):
    """A tab, and what it asked for and complained of."""

    page: Page
    requests: list[str]  # URLs, the page itself first; without those of data in the page
    complaints: list[str]  # errors and warnings of the console, and exceptions


def find_chromium() -> str | None:
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@contextmanager
def chromium() -> Iterator[Browser]:
    with sync_playwright() as driver, driver.chromium.launch(executable_path=find_chromium(), args=FLAGS) as browser:
        yield browser


@contextmanager
def opened(browser: Browser, address: str, *, viewport: dict[str, int] = LAPTOP, **options: Any) -> Iterator[Opened]:
    """A tab of a fresh profile with the page; at the end it has asked no other host."""
    with browser.new_context(viewport=viewport, **options) as context:
        tab = Opened(context.new_page(), [], [])

        def ask(url: str) -> None:
            tab.requests.extend([] if url.startswith(("data:", "blob:")) else [url])

        def listen(message: ConsoleMessage) -> None:
            tab.complaints.extend([message.text] if message.type in ("error", "warning") else [])

        tab.page.set_default_timeout(20_000)
        tab.page.on("request", lambda request: ask(request.url))
        tab.page.on("console", listen)
        tab.page.on("pageerror", lambda error: tab.complaints.append(str(error)))
        tab.page.goto(address)
        yield tab
        assert {urlsplit(url).netloc for url in tab.requests} == {urlsplit(address).netloc}
