"""Small photographs of known colors in the places of Debian's, for tests that must pass without those packages."""

import colorsys
from pathlib import Path

import numpy as np
from PIL import Image

from components.data.sources.photographs import table

WIDTH, HEIGHT = 192, 108


def write_photographs(folder: Path) -> Path:
    """Every photograph of the table, each in two shades of a hue of its own, below a flat white half."""
    for number, photograph in enumerate(table()):
        pixels = np.full((HEIGHT, WIDTH, 3), 255, np.uint8)
        for part in range(6):
            shade = colorsys.hsv_to_rgb(number / len(table()), 1, 0.5 + 0.5 * (part % 2))
            pixels[HEIGHT // 2 :, part * WIDTH // 6 : (part + 1) * WIDTH // 6] = np.multiply(shade, 255)
        path = folder / photograph.file
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path, quality=95)
    return folder
