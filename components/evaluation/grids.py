"""Labelled grids of images as PNG: dark text on white, readable on light and dark pages alike.

Images are uint8 (H, W, 3). All images of a grid are shown at one size: the smaller ones are enlarged by whole
factors without smoothing, so that what a model made at 16² is seen as it is.
"""

import math
from collections.abc import Sequence
from functools import cache
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from components.sampling.image_files import encode_png, enlarged

CELL = 128  # pixels of a shown image, at least
GAP = 8
TEXT_SIZE = 22  # pixels, at least: a tenth of a large image
LINE_GAP = 12  # pixels between a line of text and what stands below it
INK, PAPER, FRAME = (31, 41, 55), (255, 255, 255), (226, 232, 240)


class GridBlock(NamedTuple):
    """Rows of images under a common heading and over a line of words.

    Captions, where given, stand below each image.
    """

    heading: str
    images: Sequence[np.ndarray]
    captions: Sequence[str] = ()
    words: str = ""


def labelled_grid(images: Sequence[np.ndarray], labels: Sequence[str], *, columns: int | None = None) -> bytes:
    """Encodes `labelled_image` as PNG."""
    return encode_png(labelled_image(images, labels, columns=columns), optimize=True)


def labelled_image(images: Sequence[np.ndarray], labels: Sequence[str], *, columns: int | None = None) -> Image.Image:
    """Grid with a row for each group of neighbors of the same label, above the label.

    If no two neighbors share one, each label is the caption of its image. Raises ValueError for no images, or for
    other numbers of labels than of images.
    """
    if not len(images) or len(images) != len(labels):
        raise ValueError(f"a grid needs one label for each image, not {len(labels)} for {len(images)}")
    pairs = groupby(zip(labels, images, strict=True), key=itemgetter(0))
    groups = [(label, [image for _, image in members]) for label, members in pairs]
    longest = max(len(members) for _, members in groups)
    if longest == 1:
        return drawn_blocks([GridBlock("", images, labels)], columns=columns or min(6, len(images)))
    rows = [GridBlock("", members, words=label) for label, members in groups]
    return drawn_blocks(rows, columns=columns or min(8, longest))


def compared_grid(
    originals: Sequence[np.ndarray], others: Sequence[np.ndarray], *, headings: tuple[str, str], columns: int = 8
) -> bytes:
    """Rows of originals, each with the row of the compared images right below."""
    parts = [slice(start, start + columns) for start in range(0, len(originals), columns)]
    sets = (originals, others)
    blocks = [GridBlock(name, rows[part]) for part in parts for name, rows in zip(headings, sets, strict=True)]
    return render_blocks(blocks, columns=min(columns, len(originals)))


def strip_grid(x_t: Sequence[np.ndarray], x_0: Sequence[np.ndarray], captions: Sequence[str]) -> bytes:
    """Denoising strip of an image, step by step: noisy x_t above the predicted x_0."""
    blocks = [GridBlock("x_t, what the model is given", x_t), GridBlock("x_0, what it predicts", x_0, captions)]
    return render_blocks(blocks, columns=len(x_t))


def render_blocks(blocks: Sequence[GridBlock], *, columns: int) -> bytes:
    """Encodes `drawn_blocks` as PNG."""
    return encode_png(drawn_blocks(blocks, columns=columns), optimize=True)


def drawn_blocks(blocks: Sequence[GridBlock], *, columns: int) -> Image.Image:
    """Blocks from top to bottom, `columns` images in a row."""
    sides = [max(image.shape[:2]) for block in blocks for image in block.images]
    cell = max(sides) * max(1, -(-CELL // max(sides)))
    headings = max(text_font(text_size(cell)).getlength(block.heading) for block in blocks)
    width = max(GAP + columns * (cell + GAP), math.ceil(headings) + 2 * GAP)
    canvas = Image.new("RGB", (width, sum(_height(block, columns, cell) for block in blocks) + GAP), PAPER)
    top = GAP
    for block in blocks:
        _draw(canvas, block, top=top, columns=columns, cell=cell)
        top += _height(block, columns, cell)
    return canvas


def in_square(image: np.ndarray, side: int) -> Image.Image:
    """Enlarges an image (H, W, 3) to a square of side `side`; white fills the rest of an oblong image."""
    height, width = (round(length * side / max(image.shape[:2])) for length in image.shape[:2])
    square = Image.new("RGB", (side, side), PAPER)
    larger = enlarged(image, height=height, width=width)
    square.paste(Image.fromarray(larger), ((side - width) // 2, (side - height) // 2))
    return square


@cache
def text_font(size: int = TEXT_SIZE) -> ImageFont.FreeTypeFont:
    """DejaVu Sans at `size` pixels, from the fonts of matplotlib.

    Captions are in many alphabets, and Pillow's own font knows ASCII only.
    """
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)


def text_size(cell: int) -> int:
    """Text height in pixels for a grid with cells of `cell` pixels.

    Pages show a grid of large images small, so the text grows with the cell.
    """
    return max(TEXT_SIZE, cell // 10)


def fit_text(text: str, width: int, font: ImageFont.FreeTypeFont) -> str:
    """The text, cut with an ellipsis to at most `width` pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text.rstrip() + "…"


def _draw(canvas: Image.Image, block: GridBlock, *, top: int, columns: int, cell: int) -> None:
    draw, font = ImageDraw.Draw(canvas), text_font(text_size(cell))
    line = text_size(cell) + LINE_GAP
    if block.heading:
        draw.text((GAP, top), block.heading, fill=INK, font=font)
        top += line
    pitch = cell + GAP + (line if block.captions else 0)
    if block.words:
        below = top + -(-len(block.images) // columns) * pitch - GAP + 4
        draw.text((GAP, below), fit_text(block.words, canvas.width - 2 * GAP, font), fill=INK, font=font)
    for index, image in enumerate(block.images):
        left, upper = GAP + index % columns * (cell + GAP), top + index // columns * pitch
        canvas.paste(in_square(image, cell), (left, upper))
        draw.rectangle((left - 1, upper - 1, left + cell, upper + cell), outline=FRAME)
        if block.captions:
            draw.text((left, upper + cell + 4), fit_text(block.captions[index], cell, font), fill=INK, font=font)


def _height(block: GridBlock, columns: int, cell: int) -> int:
    rows = -(-len(block.images) // columns)
    lines = (text_size(cell) + LINE_GAP) * (bool(block.heading) + bool(block.words) + rows * bool(block.captions))
    return lines + rows * (cell + GAP) + GAP


def readable(name: str) -> str:
    """Name of a class or a stage for readers."""
    return name.replace("_", " ").replace("-", " ")
