"""What `cascade compare` runs and shows: the same images for all, budgets and seeds side by side, nothing left out."""

import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

from components.configuration.optimization import Training
from components.configuration.usage import UsageError
from components.evaluation.curves import CurvePoint, averaged_curves, crossing
from components.evaluation.metrics import DistanceRow
from components.evaluation.report import Table
from components.runtime.storage.artifact import Artifact
from components.runtime.storage.store import Store
from components.sampling.image_files import encode_png
from pipelines.engine import driver
from pipelines.recipes import rows
from pipelines.recipes.catalog import RECIPES, load_recipe
from pipelines.recipes.rows import APPROXIMATE, BUDGETS, MINUTES, TAXONOMY
from pipelines.suites import compare
from pipelines.suites.compare import (
    COLUMNS,
    DIFFUSION,
    RIVAL,
    SYSTEMS,
    Comparison,
    SystemResult,
    budgets,
    chosen_systems,
    comparison_table,
    draw_comparison,
    measured,
    render_comparison,
    run_compare,
)
from pipelines.suites.runner import Key, Stages, finished_stages
from pipelines.workflow import PlannedStage
from pipelines.workflows import build_workflow
from tests.unit.test_evaluation_report import Page, assert_complete

HELD_OUT = {"name": "held-out images", "distance": 26.0, "samples": 377, "purpose": "scale", "standard_error": 1.0}
BASE = {"name": "diffusion branch: base, 16²", "distance": 120.0, "samples": 256, "purpose": "model"}
MADE = {
    **{"name": "diffusion branch: upsampler 32, 32²", "distance": 90.0, "samples": 256, "purpose": "model"},
    **{"standard_error": 2.5, "precision": 0.5, "recall": 0.25},
}
STATED: dict[str, dict[str, Any]] = {
    "evaluation": {"feature_network": "net", "distances": [HELD_OUT, BASE, MADE]},
    "samples": {"summary": {"seconds_per_image_diffusion": 0.125}},
    "likelihood": {
        "summary": {
            "estimated_held_out_bits_per_dim": 3.0,
            "estimated_held_out_bits_per_dim_standard_error": 0.05,
            "png_bits_per_dim": 4.5,
        }
    },
}


@cache
def planned(recipe: str, *, seed: int = 0, minutes: int = MINUTES, source: str = "") -> list[PlannedStage]:
    options = Comparison("memory://compare", tracking=None, profile="auto").options(Key(recipe, seed, minutes, source))
    tree = load_recipe(recipe, options.set)
    return build_workflow(tree).plan(Store("memory://compare"))


def with_artifact(entry: PlannedStage) -> PlannedStage:
    metadata = STATED.get(entry.stage.name, {"summary": {"train_seconds": 60.0, "parameters": 1000}})
    artifact = Artifact(kind="report", stage=entry.stage.name, key=entry.key, files=(), metadata=metadata)
    return entry._replace(cached=artifact)


@pytest.fixture
def done(tmp_path: Path) -> Any:
    """A page on which only the systems named are finished."""

    def make(*finished: str, monkeypatch: pytest.MonkeyPatch) -> Comparison:
        prepare = driver.prepare

        def prepared(options: driver.RunOptions) -> driver.Prepared:
            found = prepare(options)
            ready = options.recipe in finished
            return replace(found, planned=[with_artifact(entry) for entry in found.planned] if ready else found.planned)

        monkeypatch.setattr(driver, "prepare", prepared)
        few = {name: system for name, system in SYSTEMS.items() if name in ("vae_32", RIVAL, *DIFFUSION)}
        monkeypatch.setattr(compare, "SYSTEMS", few)  # each budget of each is prepared
        return Comparison(str(tmp_path / "runs"), tracking=None, profile="auto")

    return make


def test_all_systems_learn_the_same_images_and_are_measured_alike() -> None:
    recipes = [recipe() for recipe in TAXONOMY]
    assert len({(recipe.images, recipe.evaluation, recipe.samples) for recipe in recipes}) == 1
    entries = [(recipe, entry.stage) for recipe in SYSTEMS for entry in planned(recipe)]
    conditioned = [getattr(stage.config, "conditioning", None) for _, stage in entries]
    assert all(conditioning is None or conditioning.conditions == () for conditioning in conditioned)
    measured = {recipe for recipe, stage in entries if stage.name == "likelihood"}
    assert measured == {"pixelcnn_32", "row_lstm_32", "vae_32", "ddpm_32", "ddpm_15_steps_32", "today_32", "hybrid_32"}
    keys = {recipe: {entry.stage.name: entry.key for entry in planned(recipe)} for recipe in SYSTEMS}
    assert len({stages["images"] for stages in keys.values()}) == 1
    assert keys["ddpm_32"]["base"] == keys["ddpm_15_steps_32"]["base"]
    assert keys["ddpm_32"]["likelihood"] == keys["ddpm_15_steps_32"]["likelihood"]
    assert keys["ddpm_32"]["samples"] != keys["ddpm_15_steps_32"]["samples"]
    assert keys["vqgan_transformer_32"]["tokens"] == keys["maskgit_32"]["tokens"]


@pytest.mark.parametrize("recipe", SYSTEMS)
def test_a_budget_is_as_many_times_the_steps_with_what_begins_in_their_midst(recipe: str) -> None:
    own, longer = build_workflow(RECIPES[recipe]()).plan(Store("memory://compare")), planned(recipe, minutes=8)
    assert [entry.key for entry in own] == [entry.key for entry in planned(recipe)]
    for before, after in zip(own, longer, strict=True):
        if isinstance(before.stage.config, Training):
            short, long = (entry.stage.config.model_dump() for entry in (before, after))
            for name in ("total_steps", "sample_every"):
                assert long["optimization"].pop(name) == 4 * short["optimization"].pop(name)
            for name in {"kl_warmup_steps", "discriminator_start"} & short.get("losses", {}).keys():
                assert long["losses"].pop(name) == 4 * short["losses"].pop(name)
            assert long == short


def test_five_systems_are_measured_at_32_minutes_and_on_scenes_too() -> None:
    principal = {"vqgan_transformer_32", "ddpm_32", "today_32", "latent_diffusion_32", "gan_32"}
    for recipe in SYSTEMS:
        found = {(key.minutes, key.source) for key in budgets(recipe, 0)}
        assert found == {(2, ""), (8, "")} | ({(32, ""), (8, "scenes")} if recipe in principal else set())
    images = planned("gan_32", minutes=8, source="scenes")[0].stage.config.model_dump()
    assert images | {"source": "openmoji", "limit": None} == planned("gan_32")[0].stage.config.model_dump()


@pytest.mark.parametrize("recipe", SYSTEMS)
def test_another_seed_is_another_training_of_every_network_on_the_same_images(recipe: str) -> None:
    one, other = planned(recipe), planned(recipe, seed=3)
    for before, after in zip(one, other, strict=True):
        if isinstance(before.stage.config, Training):
            assert after.stage.config.optimization.seed == 3
        same = before.stage.name == "images"
        assert (before.key == after.key) == same, before.stage.name
    assert next(entry.stage.config.seed for entry in other if entry.stage.name == "samples") == 3


def result(recipe: str, seed: int, stages: Stages) -> SystemResult:
    return Comparison("memory://compare", tracking=None, profile="auto").result(Key(recipe, seed, 8), stages)


def test_a_row_says_what_its_stages_state() -> None:
    prepared = [with_artifact(entry) for entry in planned("cascade_32")]
    stages = finished_stages(type("Prepared", (), {"planned": prepared})())  # pyrefly: ignore[bad-argument-type]
    cascade = result("cascade_32", 0, stages)
    assert (cascade.made, cascade.scale) == (DistanceRow(**MADE), DistanceRow(**HELD_OUT))
    assert (cascade.train_seconds, cascade.cpu_seconds, cascade.parameters) == (120.0, None, 2000)
    assert (cascade.seconds_per_image, cascade.bits, cascade.minutes, cascade.missing) == (0.125, None, 8, ())


def system(title: str, **changes: Any) -> SystemResult:
    numbers = {"recipe": "x", "title": title, "branch": APPROXIMATE, "minutes": 2, "made": DistanceRow(**MADE)}
    return SystemResult(**numbers | {"seconds_per_image": 0.125, "train_seconds": 60.0, "parameters": 12345} | changes)


def cells(table: Table, row: int) -> dict[str, Any]:
    return dict(zip(table.columns, table.rows[row], strict=True))


def test_the_table_has_a_row_for_each_finished_training_with_errors_and_then_the_scale() -> None:
    systems = (
        system("A <b>", bits=3.0, bits_error=0.05, likelihood="bound"),
        system("B", seed=1, cpu_seconds=45.0, lossless={"all as one PNG": 4.5}),
        system("C", missing=("samples",), scale=DistanceRow(**HELD_OUT), lossless={"all as one PNG": 4.5}),
    )
    table = comparison_table(systems)
    assert [row[0] for row in table.rows] == ["A <b>", "B", "held-out images", "held-out images, all as one PNG"]
    assert all(len(row) == len(COLUMNS) for row in table.rows)
    first, second = cells(table, 0), cells(table, 1)
    assert first["bits/dim"] == "3.00 ± 0.05, bound"
    assert (first["distance"], first["N"]) == ("90.0 ± 2.5", "256")
    assert first["precision"] == f"0.50 ± {(0.5 * 0.5 / 256) ** 0.5:.2f}"
    assert (first["parameters"], first["s/image"], first["trained"]) == ("0.01 M", "0.125", "1 min 00 s")
    assert (second["bits/dim"], second["seed"]) == ("–", "1")
    assert second["trained"] == "45.0 s"  # of the processor, where that is known: other work does not move it
    assert cells(table, 2)["distance"] == "26.0 ± 1.0"
    assert cells(table, 3)["bits/dim"] == "4.50"


def test_the_plot_has_a_line_a_system_over_minutes_and_seeds_are_averaged() -> None:
    far, old = DistanceRow(**MADE | {"distance": 70.0}), system("Old", minutes=0)
    systems = (system("A"), system("A", seed=1, made=far), system("A", minutes=8, made=far, bits=3.0), old)
    svg = draw_comparison((*systems, system("B", scale=DistanceRow(**HELD_OUT)), system("S", source="scenes")))
    text = Page(svg).text
    assert (
        "distance against minutes of training, one core: A 80 at 2 70 at 8, B 90 at 2, held-out images, N 377 26"
        in text
    )
    assert "bits/dim against minutes of training, one core: A 3 at 8" in text
    assert "distance against seconds for an image: A 80 at 0.125 70 at 0.125" in text
    assert not re.search("Old|S 90", text)
    assert draw_comparison((system("A", missing=("samples",)),)) == ""


@pytest.mark.parametrize(("bits", "ticks"), [(4.0, "2.00 2.25 2.50"), (180.0, "5 10 20 50 100")])
def test_a_figure_that_is_far_from_the_others_does_not_flatten_them(bits: float, ticks: str) -> None:
    svg = draw_comparison([system("A", bits=2.0), system("B", bits=3.0), system("C", bits=bits)])
    labels = re.findall(r">\s*([^<>]+?)\s*</(?:text|tspan)>", svg)
    assert ticks in (shown := " ".join(labels)), shown


def test_the_error_of_a_mean_is_that_of_samples_or_of_trainings_whichever_is_larger() -> None:
    measured = {
        "one": [(10, 3)],
        "samples": [(10, 3), (10, 4)],
        "trainings": [(8, 0.1), (12, 0.1)],
        "none": [(None, None)],
    }
    curves = averaged_curves((name, 2, *each) for name, own in measured.items() for each in own)
    assert {name: point for name, (point,) in curves.items()} == {
        "one": (2, 10.0, 3.0),
        "samples": (2, 10.0, 2.5),
        "trainings": (2, 10.0, 2.0),
    }


GAN = [CurvePoint(2, 150.0, 3.0), CurvePoint(8, 120.0, 3.0), CurvePoint(32, 100.0, 3.0)]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ((250, 150, 80), "the curves cross between 8 and 32 minutes"),
        ((250, 120, 80), "the curves cross between 2 and 32 minutes"),  # level between
        ((250, 90, 80), "the curves cross between 2 and 8 minutes"),
        ((130, 100, 80), "it is ahead of GAN from 2 minutes on"),
        ((149, 100, 80), "it is ahead of GAN from 8 minutes on"),
        ((250, 150, 93), "at 32 minutes, the largest common budget, it is not ahead of GAN"),  # 7 of an error of 4.2
        ((250, 150, 140), "at 32 minutes, the largest common budget, it is not ahead of GAN"),
        ((250, 80, 99), "at 32 minutes, the largest common budget, it is not ahead of GAN"),
        ((250, 150), "at 8 minutes, the largest common budget, it is not ahead of GAN"),
        ((130,), "it is ahead of GAN from 2 minutes on, and both are measured to 2"),
    ],
)
def test_a_crossing_is_told_where_errors_leave_no_doubt_and_nowhere_else(values: tuple[int, ...], said: str) -> None:
    curve = [CurvePoint(minutes, value, 3.0) for minutes, value in zip((2, 8, 32), values, strict=False)]
    assert crossing("A", curve, "GAN", GAN).startswith(f"A: {said}; ")
    assert crossing("A", curve, "GAN", []) == ""


def test_a_sentence_of_a_crossing_names_each_figure_with_its_error() -> None:
    distances = {"GAN": (150, 120), "DDPM, 250 steps": (250, 60), "latent diffusion": (151, 121)}
    systems = [
        system(title, minutes=minutes, made=DistanceRow(**MADE | {"distance": distance}))
        for title, values in distances.items()
        for minutes, distance in zip(BUDGETS, values, strict=True)
    ]
    crossed, level = measured(systems)["crossings"]
    numbers = "behind at 2 min (250 ± 2.5 against 150 ± 2.5), ahead at 8 min (60 ± 2.5 against 120 ± 2.5)."
    assert crossed == f"DDPM, 250 steps: the curves cross between 2 and 8 minutes; {numbers}"
    assert level.count("level within errors") == 2
    assert crossed in Page(render_comparison(systems)).text


def test_the_page_is_whole_and_says_by_what_command_the_rest_is_made() -> None:
    left = system("C", missing=("gan", "samples"), command="cascade compare gan_32", made=None)
    html = render_comparison((system("A <b>", feature_network="net"), left))
    page = Page(html)
    assert_complete(page, html)
    assert "A &lt;b&gt;" in html
    assert re.search(r"C, 2 minutes:\s*gan, samples\.\s*It is made by\s*cascade compare gan_32", page.text)
    assert "cascade compare" in Page(render_comparison((left,))).text


def test_the_page_names_the_machine_whose_minutes_the_budgets_are() -> None:
    machine = re.search(r"fp32 on (an? .+)\.$", rows.__doc__ or "", re.MULTILINE)
    assert machine is not None
    assert f"on one core of {machine[1]}, in steps" in Page(render_comparison((system("A"),))).text


def test_the_samples_of_each_finished_training_are_on_the_page_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    png = encode_png(Image.new("RGB", (1120, 64), "red"))
    of_samples = {"strip_base": b"", "diffusion_unconditional": png}
    monkeypatch.setattr(compare, "run_images", lambda artifacts: of_samples)
    finished = result("gan_32", 2, Stages({}, {}, ()))
    left = result("vae_32", 0, Stages({}, {}, ("samples",)))
    assert (finished.samples, left.samples) == (png, b"")
    html = render_comparison((finished, left))
    assert 'alt="Samples of GAN, 8 minutes, seed 2" width="560" height="32"' in html
    assert html.count("<img") == 1


def test_the_page_shows_every_seed_that_was_asked_for_and_reads_what_is_finished_once(
    done: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = done("ddpm_32", "gan_32", monkeypatch=monkeypatch)
    page.add_seed(0)
    page.write()
    before = dict(page.results)
    page.add_seed(2)
    page.write()
    assert page.seeds == [0, 2]
    assert page.results[key := Key("gan_32", 0, 8)] is before[key]
    shown = [(system.recipe, system.seed, system.minutes) for system in page.ordered() if not system.missing]
    assert shown == [(recipe, seed, m) for recipe in ("ddpm_32", "gan_32") for seed in (0, 2) for m in (2, 8, 32, 8)]
    assert {system.seed for system in page.ordered() if system.missing} == {0}
    html = page.root.read(page.page).decode()
    assert "3.00 ± 0.05, estimated bound" in html
    assert "cascade compare vae_32 --minutes 8<" in html


def test_names_may_leave_out_the_size_and_another_name_is_refused() -> None:
    assert chosen_systems(["gan", "ddpm_32"]) == ["ddpm_32", "gan_32"]
    assert chosen_systems([]) == [system.name for system in TAXONOMY]
    comparison, quiet = Comparison(None, tracking=None, profile="auto"), Console(quiet=True)
    with pytest.raises(UsageError, match="no system 'gen'; did you mean 'gan'"):
        run_compare(comparison, ["gen"], quiet, seed=0)
    with pytest.raises(UsageError, match="--minutes 32: these systems have budgets of 2, 8 minutes"):
        run_compare(comparison, ["vae"], quiet, seed=0, minutes=[2, 32])
