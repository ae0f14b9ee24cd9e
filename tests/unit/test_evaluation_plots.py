"""Laws of plots of several lines, and of the page that shows them without knowing what they are."""

import re
from typing import Any

import pytest

from components.evaluation.plots import LINES, Panel, Series, _legend, plot_svg
from components.evaluation.report import ReportData, Study, render_report
from tests.unit.test_evaluation_report import Page, assert_complete

LINE = Series("ddim & co", (5, 10, 50), (200.0, 120.0, 80.0))
OTHER = Series("heun", (9, 19, 99), (300.0, 110.0, 79.0))
PANEL = Panel("evaluations", "distance", [LINE, OTHER], levels={"250 steps": 81.0}, log_x=True, log_y=True)


def test_a_plot_holds_every_line_in_its_own_color_tells_every_number_and_is_a_file_of_its_own_too() -> None:
    svg = plot_svg([PANEL], salt="a")
    page = Page(svg)
    for number, series in enumerate((LINE, OTHER)):
        assert series.name in page.text
        assert len(re.findall(f"stroke: {LINES[number][0]}; stroke-width: 1.8", svg)) == 2  # the line, and its legend
        assert all(f"{y:.4g} at {x:.4g}" in page.text for x, y in zip(series.x, series.y, strict=True))
    assert "250 steps 81" in page.text
    assert svg.count("stroke-dasharray") == 2
    assert all(f">{tick}<" in svg for tick in ("10", "20", "50", "100", "200"))
    assert svg.startswith("<svg ")
    assert 'xmlns="http://www.w3.org/2000/svg"' in svg
    assert not re.search(r"var\(--[a-z]+\)", svg)  # each color of the page has a stand-in


def test_a_name_has_one_color_in_all_panels_and_stands_once_in_the_legend() -> None:
    both = plot_svg([Panel("x", "y", [LINE]), Panel("x", "z", [OTHER, LINE])], salt="b")
    assert both.count(">ddim &amp; co<") == 1
    assert len(re.findall(f"stroke: {LINES[0][0]}; stroke-width: 1.8", both)) == 3
    assert len(re.findall(f"stroke: {LINES[1][0]}; stroke-width: 1.8", both)) == 2


@pytest.mark.parametrize(
    "names", [["a", "b", "c", "d"], ["sde_dpm_solver_pp", *"abcdef"], ["W" * 30, "classifier, unguided"]]
)
def test_the_legend_stays_inside_the_image(names: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def legend(figure: Any, *given: Any) -> None:
        _legend(figure, *given)
        seen.append((figure.legends[0].get_window_extent(), figure.bbox, figure.axes[0].bbox))

    monkeypatch.setattr("components.evaluation.plots._legend", legend)
    plot_svg([Panel("x", "y", [LINE._replace(name=name) for name in names])], salt="d")
    ((words, image, axes),) = seen
    assert image.x0 <= words.x0 < words.x1 <= image.x1
    assert axes.y1 <= words.y0 < words.y1 <= image.y1


def test_lines_of_a_thousand_points_are_told_by_their_ends() -> None:
    many = Series("terms", tuple(range(1, 1001)), tuple(1 / t for t in range(1, 1001)))
    assert "terms from 1 at 1 to 0.001 at 1000" in plot_svg([Panel("t", "bits", [many], markers=False)], salt="d")


def report(**study: Any) -> str:
    studies = (Study(stage="steps_study", **study),)
    return render_report(ReportData(run="r", recipe="x", recipe_yaml="", stages=(), studies=studies))


def test_the_report_shows_whatever_plots_and_tables_a_stage_names() -> None:
    table = {"columns": ["sampler", "distance"], "rows": [["<ddim>", 81.25], ["heun", None]]}
    plots = {"One": plot_svg([PANEL], salt="one"), "Two": plot_svg([PANEL], salt="two")}
    page = Page(html := report(plots=plots, tables={"Distances": table}))
    assert_complete(page, html)
    assert all(words in page.text for words in ("steps study", "One", "Two", "Distances", "250 steps 81"))
    assert re.search(r"<ddim>\s*81\.2\s*heun\s*–", page.text)
    for one_alone in ({"plots": plots}, {"tables": {"Distances": table}}):
        assert "Studies" in Page(report(**one_alone)).text
