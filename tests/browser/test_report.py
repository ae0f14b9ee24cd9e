"""The report and the lecture in a real browser."""

import io
import os
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from PIL import Image

from components.evaluation.report import render_report
from tests.browser.chromium import LAPTOP, PHONE, chromium, find_chromium, opened
from tests.unit.test_evaluation_report import full_report, images
from tests.unit.test_lecture_page import lecture

pytestmark = pytest.mark.skipif(
    find_chromium() is None and os.environ.get("CI") != "true", reason="no Chromium on this machine"
)
LOADED = "[...document.images].filter(image => image.complete && image.naturalWidth > 0).length"
IMAGES = "document.images.length"
OVERFLOW = "document.documentElement.scrollWidth - innerWidth"
CONTRAST = """
(() => {
  const light = color => {
    const [r, g, b] = color.match(/[\\d.]+/g).slice(0, 3).map(v => {
      v /= 255; return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = element => {
    for (let e = element; e; e = e.parentElement) {
      const color = getComputedStyle(e).backgroundColor;
      if (!/, 0\\)$/.test(color) && color !== 'transparent') return color;
    }
    return 'rgb(255, 255, 255)';
  };
  const poor = [];
  for (const element of document.querySelectorAll('body *')) {
    if (element.closest('svg') || ![...element.childNodes].some(n => n.nodeType === 3 && n.data.trim())) continue;
    const [a, b] = [light(getComputedStyle(element).color), light(ground(element))].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < 4.5) poor.push(`${ratio.toFixed(2)} ${element.outerHTML.slice(0, 80)}`);
  }
  return poor;
})()
"""
FLAT_FORMULAS = """
[...document.querySelectorAll('math')].filter(m => m.getBoundingClientRect().height < 12).map(m => m.outerHTML)
"""


@pytest.mark.parametrize("what", ["report", "lecture"])
@pytest.mark.parametrize("dark", [False, True], ids=["laptop-light", "phone-dark"])
def test_a_page_is_drawn_whole_and_fits_without_complaint_or_any_request(what: str, dark: bool, tmp_path: Path) -> None:
    """WCAG 2.2, 1.4.3: a contrast of at least 4.5."""
    path, viewport = tmp_path / "page.html", PHONE if dark else LAPTOP
    path.write_text(render_report(full_report()) if what == "report" else lecture(), encoding="utf-8")
    scheme = "dark" if dark else "light"
    with chromium() as browser, opened(browser, path.as_uri(), viewport=viewport, color_scheme=scheme) as tab:
        tab.page.set_default_timeout(60_000)
        loaded, there, overflow = (tab.page.evaluate(each) for each in (LOADED, IMAGES, OVERFLOW))
        assert loaded == there > 0
        assert overflow <= 0
        assert [tab.page.evaluate(each) for each in (CONTRAST, FLAT_FORMULAS)] == [[], []]
        found = Axe().run(tab.page).response["violations"]
        assert [f"{each['id']}: {node['html'][:120]}" for each in found for node in each["nodes"]] == []
        corner = Image.open(io.BytesIO(tab.page.screenshot())).convert("L").getpixel((2, 2))
        assert (corner < 60) == dark
        assert (tab.complaints, len(tab.requests)) == ([], 1)
    assert what == "lecture" or loaded == len(images())
