"""Screenshots of a running service's page for docs/, of one that makes images and can edit them:

python -m tests.browser.take_screenshots http://127.0.0.1:8000 docs
"""

import io
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page

from tests.browser.chromium import PHONE, chromium, opened
from tests.browser.service_page import finished, ready


def save(page: Page, path: Path) -> None:
    Image.open(io.BytesIO(page.screenshot())).convert("RGB").save(path, optimize=True)
    print(f"{path}: {path.stat().st_size / 1024:.0f} KB")


def fill(page: Page, kind: int, seed: int) -> None:
    """The class of a number, and a seed."""
    if page.locator("#label").is_visible():
        page.locator("select#label").select_option(index=kind)
    page.locator("#seed").fill(str(seed))
    page.locator("#make").click()
    finished(page)


def edit(page: Page) -> None:
    """Paint over the middle of the image that is shown, and fill it."""
    page.get_by_role("button", name="Edit").first.click()
    box = page.locator("#mask").bounding_box()
    assert box is not None
    page.locator("#brush").fill(str(round(int(page.locator("#brush").get_attribute("max") or 8) * 0.4)))
    for place, step in ((0.35, page.mouse.down), (0.65, page.mouse.up)):
        page.mouse.move(box["x"] + place * box["width"], box["y"] + 0.5 * box["height"], steps=6)
        step()
    page.locator("#make").click()
    finished(page)


def main(address: str, folder: Path) -> None:
    with chromium() as browser:
        with opened(browser, address) as tab:
            page = ready(tab.page)
            for kind, seed in ((1, 4), (2, 1), (3, 2), (4, 7), (2, 5)):
                fill(page, kind, seed)
            if page.locator("#both").is_visible():
                page.locator("#both").check()
            fill(page, 3, 5)
            save(page, folder / "serving-page.png")
            if page.locator("#modes").is_visible():
                page.locator("#both").uncheck()
                edit(page)
                save(page, folder / "serving-edit.png")
        with opened(browser, address, viewport=PHONE, color_scheme="dark", has_touch=True) as tab:
            page = ready(tab.page)
            fill(page, 3, 5)
            page.evaluate("scrollTo(0, document.body.scrollHeight)")
            save(page, folder / "serving-phone.png")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
