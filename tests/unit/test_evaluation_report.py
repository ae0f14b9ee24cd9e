"""Laws of the report, its graph, its curves and plots, and of studies that it shows without knowing what they are."""

import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from components.evaluation.gallery import draw_columns
from components.evaluation.grids import labelled_grid
from components.evaluation.metrics import DistanceRow
from components.evaluation.plots import LINES, Panel, Series, _legend, curve_svg, plot_svg, running_mean
from components.evaluation.report import (
    DataFacts,
    ReportData,
    StageRow,
    Study,
    Table,
    bars,
    direct_parents,
    duration,
    number,
    place,
    render_report,
    shrunk,
    speed_table,
    stage_curves,
    stage_detail,
)
from components.runtime.storage.artifact import Artifact, commit_artifact
from components.runtime.storage.store import Store
from pipelines.engine.run_report import run_before

GRAPH = {
    "images": (),
    "tokenizer": ("images",),
    "tokens": ("images", "tokenizer"),
    "prior": ("tokens",),
    "base": ("images",),
    "upsampler_64": ("images",),
    "cascade": ("tokenizer", "prior", "base", "upsampler_64"),
    "samples": ("images", "cascade"),
    "evaluation": ("images", "tokenizer", "samples"),
}
VOID = {"meta", "link", "img", "br", "wbr", "hr"}


class Page(HTMLParser):
    """Checks nesting while it reads, and keeps what the laws ask about."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.text = ""
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.ids += [values["id"] or ""] if "id" in values else []
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]
        self.images += [values] if tag == "img" else []
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        self.text += data


def assert_complete(page: Page, html: str, *beside: str) -> None:
    """No id stands twice, no script runs, and nobody is asked for anything, but for files `beside` the page."""
    assert len(page.ids) == len(set(page.ids))
    assert all(link.startswith(("data:", "#", *beside)) for link in page.links)
    assert "<script" not in html


def images() -> dict[str, bytes]:
    some = list(np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8))
    grid = labelled_grid(some, ["flags", "flags", "food", "food"])
    names = ["diffusion_by_class", "diffusion_by_prompt", "tokens_by_class", "tokens_by_prompt"]
    names += ["strip_upsampler_64", "strip_base", "cascade_side_by_side", "something_new"]
    return dict.fromkeys(names, grid) | {
        "originals_and_reconstructions": draw_columns(dict.fromkeys(("original", "reconstruction"), np.stack(some)))
    }


def full_report() -> ReportData:
    stages = tuple(
        StageRow(
            name=name,
            key=f"{number:020x}",
            state="cached" if name == "images" else "done",
            seconds=None if name == "images" else 60.0 + number,
            started=None if name == "images" else 1e9 + 10 * number,
            inputs=inputs,
            uri=f"s3://bucket/runs/stages/{name}",
        )
        for number, (name, inputs) in enumerate(GRAPH.items())
    )
    points = tuple((step, {"loss": 1 / step, "learning_rate": 1e-3, "grad_norm": math.nan}) for step in range(1, 60))
    return ReportData(
        run="openmoji-1a2b3c",
        recipe="openmoji",
        recipe_yaml="name: openmoji\nprompt: <script>alert(1)</script>\n",
        stages=stages,
        finished=1e9,
        seconds=754.0,
        facts={"commit": "abc", "models": "image-cascade-openmoji"},
        curves={"base": points, "prior": points[:1]},
        images=images(),
        words={"tokens_by_prompt": ("red heart", "a <b> flag")},
        feature_network="efficientnet_lite0",
        distances=(
            DistanceRow(name="noise", distance=326.7, samples=512, purpose="scale", kid=0.01, inception_score=3.25),
            DistanceRow(name="diffusion branch: base, 16²", distance=198.4, samples=512, purpose="model"),
        ),
        nearest={"diffusion branch: base, 16²": {"median": 3.5, "held_out_median": 4.25, "share_nearer": 0.125}},
        earlier_run="openmoji-9f8e7d",
        codebook={"codebook_size": 512, "codebook_usage": 0.971, "codebook_perplexity": 340.2},
        data=DataFacts(
            source="openmoji", license="CC BY-SA 4.0", samples=100, train_samples=90, resolution=64, classes=("flags",)
        ),
        warnings=("MLflow was away & came back",),
    )


def test_the_page_is_well_formed_and_asks_nobody_for_anything() -> None:
    html = render_report(full_report())
    page = Page(html)
    assert_complete(page, html, "../openmoji-9f8e7d/report.html", "http://127.0.0.1:8000")
    assert {link[1:] for link in page.links if link.startswith("#")} <= set(page.ids)
    assert "fd_efficientnet_lite0" in page.text
    assert re.search(r"diffusion branch: base, 16²\s*512\s*198\.4", page.text)
    assert "half of the images lie within 3.5 of a training image, half of the held-out images within 4.25" in page.text
    assert "12 % are nearer to one than 95 %" in page.text
    assert "cascade serve --model models:/image-cascade-openmoji@champion" in page.text


def test_every_image_is_shown_once_with_a_text_for_those_who_do_not_see_it() -> None:
    page = Page(render_report(full_report()))
    assert len(page.images) == len(images())
    assert all(image["alt"] and image["width"] and image["height"] for image in page.images)


def test_the_words_of_a_prompt_stand_under_the_images_that_were_made_of_it() -> None:
    html = render_report(full_report())
    figure = html[html.index('<figure id="tokens_by_prompt">') :]
    words = figure.index("<li>red heart</li><li>a &lt;b&gt; flag</li>")
    assert figure.index("<img") < words < figure.index("</figure>")
    assert html.count('class="words"') == 1


def test_what_each_training_made_of_its_machine_stands_in_one_table_with_its_traces() -> None:
    data = full_report()
    points = tuple((step, {"loss": 1.0, "mfu": 0.4, "checkpoint_hold_seconds": 2.0}) for step in (1, 2))
    base = next(row for row in data.stages if row.name == "base")
    stages = (base.model_copy(update={"summary": {"checkpoint_hold_seconds": 7.0}}),)  # with the last, after all logs
    changes = {"curves": {"base": points, "prior": points}, "stages": stages, "traces": ("s3://b/runs/x/traces/t",)}
    table = speed_table(data.model_copy(update=changes))
    assert table == Table(
        columns=("training", "MFU", "checkpoints"), rows=(("base", "40 %", "7.0 s"), ("prior", "40 %", "4.0 s"))
    )
    page = Page(render_report(data.model_copy(update=changes)))
    assert "speed" in page.ids
    assert all(words in page.text for words in ("40 %", "s3://b/runs/x/traces/t"))
    assert "speed" not in Page(render_report(data)).ids  # nothing was told


def test_an_image_is_shrunk_to_a_width_and_never_enlarged() -> None:
    (grid,) = {images()["strip_base"]}
    with Image.open(io.BytesIO(grid)) as image, Image.open(io.BytesIO(shrunk(grid, width=100))) as small:
        assert small.size == (100, round(100 * image.height / image.width))
        assert shrunk(grid, width=image.width) == grid


def test_what_comes_from_outside_is_escaped() -> None:
    html = render_report(full_report())
    assert "&lt;script&gt;alert(1)" in html
    assert "away &amp; came back" in html


@pytest.mark.parametrize("missing", ["curves", "images", "distances", "codebook", "data", "seconds", "stages"])
def test_whatever_is_missing_is_left_out(missing: str) -> None:
    empty = {"data": None, "seconds": None, "distances": (), "stages": ()}.get(missing, {})
    Page(render_report(full_report().model_copy(update={missing: empty})))


def test_facts_that_are_pages_are_links_and_others_are_text() -> None:
    page = "http://mlflow:5000/#/models/image-cascade-x/versions/3"
    facts = {"storage": "s3://bucket", "version": page}
    drawn = Page(render_report(ReportData(run="r", recipe="x", recipe_yaml="", stages=(), facts=facts)))
    assert [link for link in drawn.links if "://" in link] == [page]
    assert "models/image-cascade-x/versions/3" in drawn.text


def test_a_run_that_failed_says_where_and_why() -> None:
    stages = (
        StageRow(name="images", key="a", state="cached"),
        StageRow(name="base", key="b", state="failed", seconds=3.0, started=1.0, inputs=("images",), note="no memory"),
        StageRow(name="samples", key="c", state="skipped", inputs=("base",), note="base failed"),
    )
    page = Page(render_report(ReportData(run="r", recipe="x", recipe_yaml="", stages=stages)))
    assert re.search(r"base failed\.\s*no memory", page.text)
    assert 'href="#samples"' not in render_report(ReportData(run="r", recipe="x", recipe_yaml="", stages=stages))


def test_the_graph_draws_no_line_that_follows_from_others() -> None:
    direct = direct_parents(GRAPH)
    assert direct["tokens"] == ["tokenizer"]
    assert direct["cascade"] == ["prior", "base", "upsampler_64"]
    assert direct["evaluation"] == ["samples"]


@pytest.mark.parametrize("graph", [GRAPH, {"a": (), "b": (), "c": ("a",), "d": ("b",), "e": ("a", "b")}])
def test_every_stage_stands_below_its_inputs_and_on_no_other(graph: dict[str, tuple[str, ...]]) -> None:
    parents = direct_parents(graph)
    places = place(parents)
    assert all(places[above][1] < places[name][1] for name, given in parents.items() for above in given)
    for name, (column, row) in places.items():
        others = [c for other, (c, r) in places.items() if r == row and other != name]
        assert all(abs(column - c) >= 1 for c in others)


def test_curves_leave_out_what_is_not_finite_describe_themselves_and_share_no_id() -> None:
    svg = curve_svg(((1, 2.0), (2, math.inf), (3, 1.0), (4, 1.0)), "loss", salt="c")
    assert "loss over 4 steps: from 2 to 1, lowest 1" in svg
    Page(svg)
    points = tuple((step, float(step)) for step in range(50))
    page = Page(curve_svg(points, "a", salt="one") + curve_svg(points, "b", salt="two"))
    assert len(page.ids) == len(set(page.ids)) > 2
    assert curve_svg(points, "a", salt="one") is curve_svg(tuple([*points]), "a", salt="one")  # drawn once


def test_losses_come_before_other_curves_and_what_never_changes_is_folded_away() -> None:
    values = [{"a": float(n), "still": 0.0, "b_loss": n**3.0, "loss": float(n), "b": n**2.0} for n in range(9)]
    drawn = stage_curves("tokenizer", tuple(enumerate(values)))
    assert [entry["metric"] for entry in drawn["main"]] == ["loss", "b_loss", "a", "b"]
    assert [entry["metric"] for entry in drawn["side"]] == ["still"]


def test_stages_that_ran_side_by_side_have_spans_that_overlap_and_a_cached_one_tells_what_it_once_took() -> None:
    rows = [
        StageRow(name=name, key=name, state="done", seconds=seconds, started=started)
        for name, started, seconds in (("base", 100.0, 50.0), ("tokenizer", 110.0, 30.0), ("prior", 140.0, 60.0))
    ]
    assert bars(rows) == {"base": (0.0, 50.0), "tokenizer": (10.0, 30.0), "prior": (40.0, 60.0)}
    cached = StageRow(name="base", key="a", state="cached", seconds=61.0, started=5.0)
    ran = StageRow(name="prior", key="b", state="done", seconds=2.0, started=9.0)
    assert stage_detail(cached) == "cached (1 min 01 s)"
    assert list(bars([cached, ran])) == ["prior"]


def test_times_and_numbers_are_written_for_people_and_a_running_mean_is_of_the_last_values() -> None:
    assert [duration(s) for s in (7.26, 59.96, 61, 3725, None)] == [
        "7.3 s",
        "1 min 00 s",
        "1 min 01 s",
        "1 h 02 min",
        "–",
    ]
    assert [number(v) for v in (512, 24700.4, 0.01234, 1.5e-5, None)] == ["512", "24,700", "0.0123", "1.5e-05", "–"]
    assert running_mean([1.0, 2.0, 3.0, 5.0], width=2) == [1.0, 1.5, 2.5, 4.0]


LINE = Series("ddim & co", (5, 10, 50), (200.0, 120.0, 80.0))
OTHER = Series("heun", (9, 19, 99), (300.0, 110.0, 79.0))
PANEL = Panel("evaluations", "distance", [LINE, OTHER], levels={"250 steps": 81.0}, log_x=True, log_y=True)


def test_a_plot_holds_every_line_in_its_own_color_tells_every_number_and_is_a_file_of_its_own_too() -> None:
    svg = plot_svg([PANEL], salt="a")
    page = Page(svg)
    for (color, _), series in zip(LINES, (LINE, OTHER), strict=False):
        assert series.name in page.text
        assert len(re.findall(f"stroke: {color}; stroke-width: 1.8", svg)) == 2  # and in the legend
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


def test_distances_are_compared_with_the_run_before_by_equal_numbers_of_images(tmp_path: Path) -> None:
    root, evaluation, plan = Store(str(tmp_path)), dict[str, Any](), dict[str, Any]()
    for run, rows in {"gan-1": [("a", 64, 9.0), ("b", 64, 8.0)], "gan-2": [("a", 64, 7.0), ("b", 128, 6.0)]}.items():
        measured = [{"name": n, "samples": count, "distance": d, "purpose": "model"} for n, count, d in rows]
        evaluation = {"feature_network": "inception", "distances": measured}
        artifact = Artifact(kind="report", stage="evaluation", key=run, files=(), metadata=evaluation)
        commit_artifact(root.join("stages", "evaluation", run), artifact)
        stages = [{"name": "evaluation", "key": run, "state": "done"}]
        plan = {"saved": float(run[-1]), "facts": {"recipe": "gan", "models": "m"}, "stages": stages}
        root.write(f"runs/{run}/plan.json", json.dumps(plan).encode())
        root.write(f"runs/{run}/recipe.yaml", b"")
    before = run_before(root, "gan-2", plan, evaluation)
    assert before is not None
    table = before.changes.tables["Fréchet distances"]
    assert (table.columns, table.rows) == (("images", "N", "before", "now"), (("a", 64, 9.0, 7.0),))
