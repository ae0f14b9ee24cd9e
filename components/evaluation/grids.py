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
    Captions, where given, stand below each image."""

    heading: str
    images: Sequence[np.ndarray]
    captions: Sequence[str] = ()
    words: str = ""


def labelled_grid(images: Sequence[np.ndarray], labels: Sequence[str]) -> bytes:
    """Grid (PNG) with a row for each group of neighbors of the same label, above the label.
    If no two neighbors share one, each label is the caption of its image. Raises ValueError for no images, or for other
    numbers of labels than of images."""
    if not len(images) or len(images) != len(labels):
        raise ValueError(f"a grid needs one label for each image, not {len(labels)} for {len(images)}")
    pairs = groupby(zip(labels, images, strict=True), key=itemgetter(0))
    rows = [GridBlock("", [image for _, image in members], words=label) for label, members in pairs]
    longest = max(len(row.images) for row in rows)
    if longest == 1:
        return render_blocks([GridBlock("", images, labels)], columns=min(6, len(images)))
    return render_blocks(rows, columns=min(8, longest))


def render_blocks(blocks: Sequence[GridBlock], *, columns: int) -> bytes:
    """Blocks from top to bottom, `columns` images in a row, as PNG.
    Pages show a grid of large images small, so the text grows with the images."""
    side = max(max(image.shape[:2]) for block in blocks for image in block.images)
    cell = side * max(1, -(-CELL // side))
    size = max(TEXT_SIZE, cell // 10)
    font, line, heights = text_font(size), size + LINE_GAP, []
    for block in blocks:
        rows = -(-len(block.images) // columns)
        lines = bool(block.heading) + bool(block.words) + rows * bool(block.captions)
        heights.append(lines * line + rows * (cell + GAP) + GAP)
    headings = max(font.getlength(block.heading) for block in blocks)
    width = max(GAP + columns * (cell + GAP), math.ceil(headings) + 2 * GAP)
    canvas, end = Image.new("RGB", (width, sum(heights) + GAP), PAPER), GAP
    draw = ImageDraw.Draw(canvas)
    for block, height in zip(blocks, heights, strict=True):
        top, end = end, end + height
        if block.heading:
            draw.text((GAP, top), block.heading, fill=INK, font=font)
            top += line
        if block.words:
            words = fit_text(block.words, width - 2 * GAP, font)
            draw.text((GAP, end - line - 2 * GAP + 4), words, fill=INK, font=font)
        pitch = cell + GAP + (line if block.captions else 0)
        for index, image in enumerate(block.images):
            left, upper = GAP + index % columns * (cell + GAP), top + index // columns * pitch
            canvas.paste(in_square(image, cell), (left, upper))
            draw.rectangle((left - 1, upper - 1, left + cell, upper + cell), outline=FRAME)
            if block.captions:
                draw.text((left, upper + cell + 4), fit_text(block.captions[index], cell, font), fill=INK, font=font)
    return encode_png(canvas, optimize=True)


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
    Captions are in many alphabets, and Pillow's own font knows ASCII only."""
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)


def fit_text(text: str, width: int, font: ImageFont.FreeTypeFont) -> str:
    """The text in one line, cut with an ellipsis to at most `width` pixels."""
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}…") > width:
        text = text[:-1]
    return f"{text.rstrip()}…"


def readable(name: str) -> str:
    """Name of a class or a stage for readers."""
    return name.replace("_", " ").replace("-", " ")
