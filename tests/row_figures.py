"""Draw docs/rows.png and docs/diffusion_rows.png: a line of images of each row, with the words it was asked by.

python -m tests.row_figures STORAGE: lines in docs/lines of all recipes that `cascade lecture` has finished there are
drawn anew; then both images are put together from docs/lines. A line has its recipe's own summary. docs/compare.png has
a line of each system that `cascade compare` has finished there, at its largest budget.
"""

import io
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from components.data.listing import SourceError
from components.evaluation.gallery import GRIDS, ORIGINALS
from components.evaluation.grids import (
    CELL,
    GAP,
    INK,
    LINE_GAP,
    PAPER,
    TEXT_SIZE,
    GridBlock,
    render_blocks,
    text_font,
)
from components.runtime.storage.artifact import Artifact
from components.runtime.storage.store import Store
from components.sampling.frozen_text import FrozenTextError
from components.sampling.image_files import encode_png
from pipelines.engine import driver
from pipelines.recipes.diffusion_rows import DIFFUSION_ROWS, FASHION
from pipelines.recipes.rows import DISCRETE_ROWS
from pipelines.suites.compare import Comparison, described
from pipelines.suites.runner import finished_stages

DOCS = Path(__file__).parents[1] / "docs"
LINES, ACROSS = DOCS / "lines", 8  # images of a line
WIDTH = GAP + ACROSS * (CELL + GAP)  # pixels
IMAGES = {"rows.png": DISCRETE_ROWS, "diffusion_rows.png": (*DIFFUSION_ROWS, *FASHION)}
SUMMARIES = {row.name: row.summary for rows in IMAGES.values() for row in rows}
LETTERS = 92  # that fit in a heading
CAPTION_SIZE, CAPTION_LETTERS = 14, 16  # pixels, and letters that fit below an image
KINDS = ("by_prompt", "by_class", "unconditional", "by_condition")


def line_of(recipe: str, artifacts: Mapping[str, Artifact]) -> bytes | None:
    """The line (PNG) of a finished recipe: samples, each by other words, or reconstructions; None without any."""
    heading, samples = SUMMARIES[recipe], artifacts.get("samples")
    for kind in KINDS if samples is not None else ():
        parts = sorted(name for name in samples.names() if f"_{kind}-" in name and name.endswith(".npz"))
        if parts:
            images = np.concatenate([finished(samples.read(name)) for name in parts])
            tables = samples.metadata["words"].items()
            words = (next((own for name, own in tables if name.endswith(kind)), ()) or [""] * len(images))[:ACROSS]
            step = len(images) // len(words)
            each = min(step, max(1, ACROSS // len(words)))  # images of the same words
            chosen = [images[number * step + k] for number in range(len(words)) for k in range(each)]
            words = [own for own in words for _ in range(each)] if any(words) else []
            return captioned(render_blocks([GridBlock("", [*map(small, chosen)])], columns=ACROSS), heading, words)
    for artifact in artifacts.values():
        if f"{ORIGINALS}.png" in artifact.names():
            pairs = cells(artifact.read(f"{ORIGINALS}.png"))
            return captioned(render_blocks([GridBlock("", pairs)], columns=ACROSS), heading)
    return None


def captioned(line: bytes, heading: str, words: Sequence[str] = ()) -> bytes:
    """A line below its heading, with words below its images; either takes as many rows of text as it needs."""
    small_font, image = text_font(CAPTION_SIZE), Image.open(io.BytesIO(line))
    headings, wrapped = textwrap.wrap(heading, LETTERS), [textwrap.wrap(each, CAPTION_LETTERS) for each in words]
    above = len(headings) * (TEXT_SIZE + LINE_GAP)
    below = max(map(len, wrapped), default=0) * (CAPTION_SIZE + 2)
    canvas = Image.new("RGB", (WIDTH, above + image.height + below), PAPER)
    canvas.paste(image, (0, above))
    draw = ImageDraw.Draw(canvas)
    for number, row in enumerate(headings):
        draw.text((GAP, GAP + number * (TEXT_SIZE + LINE_GAP)), row, fill=INK, font=text_font())
    for number, rows in enumerate(wrapped):
        place = (GAP + number * (CELL + GAP), above + image.height - GAP)
        draw.multiline_text(place, "\n".join(rows), fill=INK, font=small_font, spacing=2)
    return encode_png(canvas, optimize=True)


def finished(archive: bytes) -> np.ndarray:
    """Images (N, H, W, 3) of the last stage in a job's file."""
    with np.load(io.BytesIO(archive)) as arrays:
        return arrays[[name for name in arrays.files if name.startswith("image.")][-1]]


def small(image: np.ndarray) -> np.ndarray:
    """An image in three channels, whose side divides that of a cell."""
    drawn = Image.fromarray(np.broadcast_to(image, (*image.shape[:2], 3)))
    return np.asarray(drawn.resize((CELL, CELL), Image.Resampling.LANCZOS) if CELL % drawn.width else drawn)


def cells(grid: bytes) -> list[np.ndarray]:
    """Originals of a grid of `draw_columns`, each before its reconstruction, as many as a line has."""
    image = Image.open(io.BytesIO(grid)).convert("RGB")
    side = (image.width - GAP) // GRIDS - GAP
    line = max(TEXT_SIZE, side // 10) + LINE_GAP
    tops = [GAP + line, GAP + 2 * line + side + 2 * GAP]
    places = [(GAP + number * (side + GAP), top) for number in range(ACROSS // 2) for top in tops]
    return [small(np.asarray(image.crop((left, top, left + side, top + side)))) for left, top in places]


def together(recipes: Iterable[str]) -> bytes:
    """The lines of recipes below each other (PNG); those without a line are left out."""
    lines = [Image.open(path) for name in recipes if (path := LINES / f"{name}.png").exists()]
    canvas = Image.new("RGB", (WIDTH, sum(line.height for line in lines)), PAPER)
    top = 0
    for line in lines:
        canvas.paste(line, (0, top))
        top += line.height
    return encode_png(canvas, optimize=True)


def systems(root: Store) -> bytes | None:
    """Lines of the systems of the comparison on drawings, each at its largest finished budget (PNG); None without."""
    comparison, blocks = Comparison(root.uri, tracking=None, profile="auto"), dict[str, GridBlock]()
    keys = comparison.keys()
    for key in (key for key in keys if not (key.seed or key.source)):  # smaller budgets first
        stages = finished_stages(driver.prepare(comparison.options(key)))
        if not stages.missing:
            parts = sorted(name for name in stages.artifacts["samples"].names() if "_unconditional-" in name)
            images = finished(stages.artifacts["samples"].read(next(name for name in parts if name.endswith(".npz"))))
            blocks[key.recipe] = GridBlock(described(key), [*map(small, images[:ACROSS])])
    return render_blocks([*blocks.values()], columns=ACROSS) if blocks else None


def main(storage: str) -> None:
    """Draw the lines of the recipes that are finished in a storage, and all images."""
    root = Store(storage)
    if (png := systems(root)) is not None:
        (DOCS / "compare.png").write_bytes(png)
    for recipe in SUMMARIES:
        try:
            prepared = driver.prepare(driver.RunOptions(recipe=recipe, storage=root.uri, tracking="none"))
        except (SourceError, FrozenTextError):  # it can't have run here
            continue
        stages = finished_stages(prepared)
        if not stages.missing and (png := line_of(recipe, stages.artifacts)) is not None:
            (LINES / f"{recipe}.png").write_bytes(png)
            print(recipe)
    for name, rows in IMAGES.items():
        (DOCS / name).write_bytes(together(row.name for row in rows))


if __name__ == "__main__":
    main(*sys.argv[1:])
