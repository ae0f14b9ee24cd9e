"""The report and the lecture in a real browser."""

import io
import os
from pathlib import Path

import pytest
from PIL import Image

from components.evaluation.report import render_report
from tests.browser.chromium import Visit, find_chromium, visit
from tests.unit.test_evaluation_report import full_report, images
from tests.unit.test_lecture_page import lecture

pytestmark = pytest.mark.skipif(
    find_chromium() is None and os.environ.get("CI") != "true", reason="no Chromium on this machine"
)
LOADED = "[...document.images].filter(image => image.complete && image.naturalWidth > 0).length"
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


@pytest.fixture(scope="module", params=[(1280, False), (390, True)], ids=["desktop-light", "phone-dark"])
def opened(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Visit:
    width, dark = request.param
    page: Path = tmp_path_factory.mktemp("report") / "report.html"
    page.write_text(render_report(full_report()), encoding="utf-8")
    return visit(page.as_uri(), width=width, dark=dark, expressions=[LOADED, OVERFLOW, CONTRAST])


def test_the_report_opens_without_complaint_or_any_request(opened: Visit) -> None:
    assert opened.complaints == []
    assert len(opened.requests) == 1


def test_all_images_of_the_report_are_loaded(opened: Visit) -> None:
    assert opened.answers[0] == len(images())


def test_the_report_fits_the_width_of_its_window(opened: Visit) -> None:
    assert opened.answers[1] <= 0


def test_all_text_of_the_report_stands_out_from_its_ground(opened: Visit) -> None:
    """WCAG 2.2, 1.4.3: a contrast of at least 4.5."""
    assert opened.answers[2] == []


def test_the_report_follows_the_light_or_dark_of_the_system(opened: Visit, request: pytest.FixtureRequest) -> None:
    corner = Image.open(io.BytesIO(opened.screenshot)).convert("L").getpixel((2, 2))
    assert (corner < 60) == ("dark" in request.node.callspec.id)


@pytest.fixture(scope="module", params=[(1366, False), (390, True)], ids=["laptop-light", "phone-dark"])
def lecture_opened(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Visit:
    width, dark = request.param
    page: Path = tmp_path_factory.mktemp("lecture") / "lecture.html"
    page.write_text(lecture(), encoding="utf-8")
    return visit(page.as_uri(), width=width, dark=dark, expressions=[LOADED, OVERFLOW, CONTRAST, FLAT_FORMULAS])


def test_the_lecture_is_drawn_whole_without_complaint_or_any_request(lecture_opened: Visit) -> None:
    loaded, overflow, poor, flat = lecture_opened.answers
    assert loaded > 0
    assert overflow <= 0
    assert (poor, flat) == ([], [])
    assert lecture_opened.complaints == []
    assert len(lecture_opened.requests) == 1
