"""The page of the lecture: complete in itself, its formulas drawn, its code read from the source."""

import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from components.evaluation.codes_study import PATCHES, TABLE
from components.evaluation.gallery import INDEX_GRIDS
from components.evaluation.metrics import DistanceRow
from components.evaluation.noising_study import ERRORS, FORWARD, PREDICTED, SCHEDULES, VALUES, VARIANCE
from components.evaluation.plots import curve_svg
from components.evaluation.report import Table
from components.evaluation.sampling_studies import STAGES
from components.sampling.image_files import encode_png
from pipelines.recipes.catalog import ROWS
from pipelines.suites import slides
from pipelines.suites.compare import SystemResult
from pipelines.suites.lecture import SLIDES, RecipeResult, chosen_rows, own_images, render_lecture, taxonomy_tree
from pipelines.suites.slides import LECTURE, CodeReference, Slide, read_code, read_slides
from tests.unit.test_evaluation_report import Page, assert_complete

POINTS = tuple((step, 1 / step) for step in range(1, 5))


def png(color: str) -> bytes:
    return encode_png(Image.new("RGB", (4, 4), color))


def result(recipe: str, **changes) -> RecipeResult:
    numbers: dict[str, Any] = {"row": "T1", "recipe": recipe, "summary": "VAE <b>.", "train_seconds": 95.0}
    numbers |= {"figures": {"bits_per_dim": 3.25}, "report": "runs/a/report.html"}
    return RecipeResult(**numbers | changes)


def lecture(shown: tuple[Slide, ...] = SLIDES, **changes) -> str:
    """The page as if all recipes had been run, but for those that are given."""
    drawn = {
        "plots": {"Terms over t": curve_svg(POINTS, "loss", salt="study")},
        "tables": {"Figures": Table(columns=("t", "bits"), rows=(("1", 4.25),))},
        "curves": {"model: loss": curve_svg(POINTS, "loss", salt="loss")},
        "images": {"strip_base": png("red"), "made": png("blue")},
    }
    full = {recipe: result(recipe, row=row, **drawn) for recipe, row in chosen_rows([]).items()}
    return render_lecture(shown, full | changes)


def test_the_page_is_well_formed_without_script_and_asks_nobody_for_anything() -> None:
    html = lecture()
    page = Page(html)
    assert_complete(page, html, "runs/a/report.html", "https://")  # links of sources: nothing is asked of them
    assert {link[1:] for link in page.links if link.startswith("#")} <= set(page.ids)
    assert "VAE &lt;b&gt;." in html


def test_each_recipe_of_a_row_stands_whole_on_one_slide() -> None:
    whole = [recipe for slide in SLIDES for recipe in slide.recipes if not slide.shows]
    assert set(whole) <= chosen_rows([]).keys(), "slides name recipes that are no row"
    counts = {f"row {row}, {recipe}: {whole.count(recipe)} slides" for recipe, row in chosen_rows([]).items()}
    wrong = [line for line in sorted(counts) if not line.endswith(": 1 slides")]
    place = LECTURE.relative_to(slides.ROOT)
    assert not wrong, f"{wrong}: give each one slide without `shows` in {place}, by the line `- recipes: NAME`"


def test_each_recipe_has_one_place_in_the_taxonomy_with_a_link_to_its_slide() -> None:
    def places(tree: dict[str, Any]) -> list[str]:
        inside = [place for branch in tree["branches"].values() for place in places(branch)]
        return inside + [recipe for _, slide in tree["slides"] for recipe in slide.recipes]

    tree = taxonomy_tree(SLIDES)
    assert sorted(places(tree)) == sorted(ROWS), "give each slide with recipes a line `- branch: A > B`"
    assert set(tree["branches"]) == {"Explicit density", "Implicit density"}
    html = lecture().partition('class="tree"')[2].partition("</div>")[0]
    assert all(html.count(f'<a href="#{anchor}">{slide.title}</a>') for anchor, slide in tree["slides"])
    assert html.count("✓") == len(ROWS)


def test_what_was_compared_stands_on_the_page_and_what_was_not_is_said() -> None:
    system = SystemResult(
        recipe="gan_32", title="GAN <b>", made=DistanceRow(name="a", distance=9.5, samples=2, purpose="model")
    )
    drawn = Slide(chapter="One", title="One", draws=("comparison",))
    html = render_lecture([drawn], {}, [system])
    assert "GAN &lt;b&gt;" in html
    assert "make compare" in render_lecture([drawn], {})
    assert {name for slide in SLIDES for name in slide.draws} == {"tree", "comparison", "reverse_step"}


def test_recipes_beside_each_other_are_shown_by_the_first_images_that_they_made_and_their_distances() -> None:
    images = {"cascade_side_by_side": png("red"), "diffusion_by_prompt": png("blue"), "tokens_by_class": png("red")}
    changes = {"images": images, "words": {"diffusion_by_prompt": ("a red heart",)}}
    made = result("glide", row="D8", figures={"distance, samples (N 256)": 62.0, "bits": 3.0}, **changes)
    slide = Slide(chapter="One", title="One", side_by_side=("glide", "gan"))
    page = Page(html := render_lecture([slide], {"glide": made, "gan": result("gan")}))
    assert [image["alt"] for image in page.images] == ["Images of glide"]
    assert "D8: glide; distance, samples (N 256) 62<" in html
    assert "a red heart" in page.text
    assert {name for slide in SLIDES for name in slide.side_by_side} <= ROWS.keys()


def test_what_a_slide_names_is_an_image_a_plot_or_a_table_that_there_is() -> None:
    stages = {STAGES, "Distance against steps of each stage, N 128", "by_stage_steps"}
    drawn = (
        stages | {INDEX_GRIDS, FORWARD, PREDICTED, VALUES, SCHEDULES, ERRORS, VARIANCE, "strip_base"} | {PATCHES, TABLE}
    )
    assert {name for slide in SLIDES for name in slide.shows} <= drawn


def test_a_slide_is_read_from_its_words_its_formulas_and_its_lines() -> None:
    text = (
        "How to read this.\n\n# One\n\n## Two\n\nWords of\ntwo lines.\n\n$$x_t$$\n\n$$\\epsilon$$\n\n"
        "- slip: It is −x,\n  not x.\n- code: file.py A.f `x = (`\n- recipes: gan, vae\n- shows: A, b\n- shows: c\n"
        "- row: T1 | a | b | c\n- branch: A > B c\n- draws: tree\n- side_by_side: gan, vae\n- source: A | https://a.b\n"
        "\n## Three\n"
    )
    first, second = read_slides(text)
    assert (first.chapter, first.title, first.text) == ("One", "Two", "Words of two lines.")
    assert (first.formulas, first.slip) == (("x_t", "\\epsilon"), "It is −x, not x.")
    assert first.code == (CodeReference(file="file.py", name="A.f", words="x = ("),)
    assert (first.recipes, first.shows, first.rows) == (("gan", "vae"), ("A, b", "c"), ("T1 | a | b | c",))
    assert (first.branch, first.draws, first.side_by_side) == (("A", "B c"), ("tree",), ("gan", "vae"))
    assert first.sources == (("A", "https://a.b"),)
    assert second == Slide(chapter="One", title="Three")


@pytest.mark.parametrize(
    ("line", "complaint"),
    [("- recipe: gan", "slide 'Two' has a line 'recipe'"), ("- code: file.py A.f", "slide 'Two': 'file.py A.f' is no")],
)
def test_a_line_that_can_not_be_read_is_named_with_its_slide(line: str, complaint: str) -> None:
    with pytest.raises(LookupError, match=complaint):
        read_slides(f"# One\n\n## Two\n\n{line}\n")


def test_the_page_says_what_a_recipe_made_measured_and_took() -> None:
    html = lecture()
    assert html.count("1 min 35 s") == html.count("<b>3.25</b>") == len(ROWS)
    assert html.count(': made"') == len(ROWS)
    assert html.count("model: loss") == html.count('<td class="right">4.25</td>') == len(ROWS)


@pytest.mark.parametrize("formula", sorted({formula for slide in SLIDES for formula in slide.formulas}))
def test_every_formula_is_drawn_as_mathml(formula: str) -> None:
    slide = Slide(chapter="One", title="One", formulas=(formula,))
    html = render_lecture([slide], {})
    assert html.count("<math") == 1
    drawn = re.search(r"<math.*</math>", html, re.DOTALL)
    assert drawn is not None
    assert not re.search(r"\\[a-z]+|<mi>&</mi>", drawn[0])  # a command that the library does not know stays as it is


@pytest.mark.parametrize("reference", [code for slide in SLIDES for code in slide.code], ids=lambda code: code.name)
def test_every_formula_stands_in_the_code_where_its_slide_says(reference: CodeReference) -> None:
    marked = [line for line in read_code(reference) if line.is_formula]
    assert marked
    source = (slides.ROOT / reference.file).read_text().splitlines()
    assert any(reference.words in line.text for line in marked)
    assert all(source[line.number - 1].endswith(line.text) for line in marked)


SCHEDULE = "components/models/diffusion/schedule.py"


@pytest.mark.parametrize(
    ("file", "name", "words", "complaint"),
    [
        ("components/models/gone.py", "sample", "x", "no file components/models/gone.py"),
        (SCHEDULE, "Schedule.gone", "x", "no Schedule.gone in"),
        (SCHEDULE, "Schedule.add_noise", "minus", "'minus' stands nowhere in"),
        (SCHEDULE, "Schedule.add_noise", "Draw x_t", "'Draw x_t' stands nowhere in"),
    ],
    ids=["file", "definition", "statement", "docstring"],
)
def test_code_that_is_gone_is_missed(file: str, name: str, words: str, complaint: str) -> None:
    with pytest.raises(LookupError, match=complaint):
        read_code(CodeReference(file=file, name=name, words=words))


def test_code_is_shown_without_docstring_and_near_its_formula(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slides, "ROOT", tmp_path)
    (tmp_path / "file.py").write_text(
        "class A:\n    def f(self):\n        '''Words.'''\n"
        + "".join(f"        x = ({n},\n            0)\n" for n in range(40))
    )
    lines = read_code(CodeReference(file="file.py", name="A.f", words="(20,"))
    assert lines[0].text == "def f(self):"
    assert [line.text for line in lines if line.is_formula] == ["    x = (20,", "        0)"]
    assert [line.text for line in lines].count("    …") == 2
    assert len(lines) < 20
    assert not any("Words" in line.text for line in lines)


def test_what_is_not_finished_is_said_with_the_command_that_makes_it() -> None:
    away = result("gan", missing=("images",), obstacle="no such images are here.", train_seconds=None, report="")
    begun = result("vae", missing=("samples", "evaluation"), train_seconds=None, figures={}, report="")
    html = lecture(gan=away, vae=begun)
    assert f"{len(ROWS) - 2} of {len(ROWS)} recipes are finished" in html
    assert "samples, evaluation. It is made by <code>make lecture ROW=vae</code>" in html
    assert "no such images are here. <code>make lecture ROW=gan</code>" in html
    assert "Not finished" not in lecture()


def test_a_prior_is_known_by_what_it_makes_and_an_autoencoder_by_what_it_keeps() -> None:
    kept, made = {"originals_and_reconstructions": png("red")}, {"gan_by_class": png("blue")}
    assert own_images(kept | made) == made
    assert own_images(kept) == kept
    drawn = {"vae_unconditional": png("blue"), "vae_nearest": png("red"), "real_images": png("red")}
    assert own_images(kept | drawn) == kept | drawn
    assert own_images({}) == {}


def test_the_words_of_a_prompt_stand_under_the_images_that_were_made_of_it() -> None:
    made = result("dalle", images={"tokens_by_prompt": png("red")}, words={"tokens_by_prompt": ("red heart",)})
    figure = lecture(dalle=made).partition("-tokens_by_prompt")[2]
    assert figure.index("<img") < figure.index("<li>red heart</li>") < figure.index("</figure>")


def test_a_slide_shows_of_a_recipe_what_it_names_and_the_rest_is_shown_where_the_recipe_stands_whole() -> None:
    whole = Slide(chapter="One", title="One", recipes=("ddpm",))
    named = whole.model_copy(update={"shows": ("strip_base", "Terms over t")})
    page = Page(lecture((named, whole)))
    assert [str(image["alt"]).partition(",")[0] for image in page.images] == [
        "ddpm: Denoising by base: noisy images above the clean ones that it predicts",
        "ddpm: made",
    ]
    assert page.text.count("Terms over t") == 1
    assert page.text.count("model: loss") == 1
    slide = Slide(chapter="One", title="One", recipes=("ddpm",), shows=("made", "Terms over t", "Figures"))
    page = Page(lecture((slide,)))
    assert len(page.images) == 1
    assert "Terms over t" in page.text
    assert "4.25" in page.text
    assert "model: loss" not in page.text
