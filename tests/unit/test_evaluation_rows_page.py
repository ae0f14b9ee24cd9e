"""The page of all rows: complete in itself, with an image and the figures of each."""

import io

from PIL import Image

from components.evaluation.rows_page import RowResult, image_of, render_rows


def png(color: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), color).save(file, format="PNG")
    return file.getvalue()


def result(recipe: str, **changes) -> RowResult:
    numbers = {"row": "T1", "recipe": recipe, "about": "VAE <b>.", "seconds": 95.0, "figures": {"bits_per_dim": 3.25}}
    return RowResult(**{**numbers, "images": {}, "report": "file:///report.html"} | changes)


def test_the_page_holds_every_row_with_its_figures_and_asks_nothing_of_a_network():
    page = render_rows([result("vae", images={"vae_unconditional": png("red")}), result("gan", seconds=None)])
    assert all(
        word in page for word in ('id="vae"', 'id="gan"', "3.25", "bits per dim", "1 min 35 s", "data:image/png")
    )
    assert "VAE &lt;b&gt;." in page
    assert "http" not in page.replace("http-equiv", "")


def test_a_row_is_known_by_what_it_makes_and_else_by_what_it_keeps():
    kept, made = {"originals_and_reconstructions": png("red")}, {"gan_by_class": png("blue")}
    assert image_of(result("gan", images=kept | made)) == list(made.items())
    assert image_of(result("vqvae", images=kept)) == list(kept.items())
    assert image_of(result("none")) == []
