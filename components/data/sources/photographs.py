"""Patches of photographs in Debian's packages, named in photographs.csv with author and license.

Photographs are shrunk with antialiasing until SPAN patches fit along the shorter side, and a patch is a square one or
two patches wide there: a leaf, a shore, a house. Of CHOICES squares, drawn by a seed of photograph and number, that
whose neighboring coarse colors differ most is taken: neither flat sky nor a ramp of light. Photographs are held out
whole, for patches of one that is trained on would show what the others hide.
"""

import csv
import hashlib
from collections import Counter
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import count, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from components.data.images import fit_square
from components.data.listing import FileVersion, SourceError, first_file
from components.data.shards import order_of, split_of
from components.data.sources.source import ONE_CLASS, Drawing, Item, Source, safe_keys
from components.runtime.storage.store import Store, read_url
from components.sampling.image_files import open_header, to_rgb

VERSION = 1  # of the choice of patches
INSTALLED = "/usr/share"  # where Debian's packages have their photographs
PATCHES = 128  # of a photograph
SPAN = 4  # patches along the shorter side of a shrunk photograph
CHOICES = 6  # squares that a patch is chosen from
COARSE = 16  # pixels of a side of a square when colors are compared


class Photograph(NamedTuple):
    """A line of the table."""

    package: str
    file: str  # below /usr/share
    title: str
    author: str
    license: str


@dataclass(frozen=True)
class PhotographReader:
    """Cuts a patch; `item.location` is the number of the photograph in the table."""

    path: str

    def read(self, item: Item) -> bytes:
        return b""  # a photograph is read once in a process, and has many patches

    def draw(self, item: Item, data: bytes, *, resolution: int) -> Drawing:
        photograph = table()[int(item.location)]
        image = shrunk(Store(self.path).url(photograph.file), SPAN * resolution)
        square = max(drawn_squares(item.key, image.size), key=lambda square: contrast(image.crop(square)))
        named = photograph._asdict() | {"of": image.size, "square": square}
        return Drawing(fit_square(image.crop(square), resolution), details=named)


def list_photographs(path: str | None = None, *, holdout_fraction: float = 0.0) -> Source:
    """Lists PATCHES patches of each photograph below `path`, or of the installed packages.
    Of all photographs the share `holdout_fraction` is held out, drawn by hash; a patch's number is such that its key
    falls into the split of its photograph. Raises SourceError for missing photographs."""
    root = path or INSTALLED
    find_photographs(root)
    names, items = safe_keys([photograph.title for photograph in table()]), list[Item]()
    held_out = set(sorted(names, key=order_of)[: round(holdout_fraction * len(names))])
    for number, name in enumerate(names):
        split = "holdout" if name in held_out else "train"
        keys = (key for key in (f"{name}-{n:04d}" for n in count()) if split_of(key, holdout_fraction) == split)
        items += [Item(key, 0, table()[number].title.lower(), str(number)) for key in islice(keys, PATCHES)]
    licenses = Counter(photograph.license for photograph in table())
    license_ = f"{', '.join(f'{name} ({n})' for name, n in licenses.items())}: {len(names)} photographs"
    return Source("photographs", license_, ONE_CLASS, tuple(items), PhotographReader(root))


@cache
def table() -> tuple[Photograph, ...]:
    """All photographs, in the order of the table."""
    with Path(__file__).with_name("photographs.csv").open(newline="") as file:
        return tuple(Photograph(**row) for row in csv.DictReader(file))


def find_photographs(root: str) -> tuple[FileVersion, ...]:
    """The files of all photographs below `root`, by their paths in the table.
    Raises SourceError, with the command that installs what is missing."""
    found = {photograph: first_file(Store(root).url(photograph.file)) for photograph in table()}
    if missing := [photograph for photograph, file in found.items() if file is None]:
        packages = " ".join(dict.fromkeys(photograph.package for photograph in missing))
        raise SourceError(
            f"photographs are not here ({len(missing)} of {len(found)} are missing below {root}, such as "
            f"{missing[0].file}): apt-get install {packages}, or name a folder that has them"
        )
    return tuple(file._replace(path=photograph.file) for photograph, file in found.items() if file is not None)


def installed_folder() -> str:
    """The folder of Debian's packages. Raises SourceError for missing photographs."""
    find_photographs(INSTALLED)
    return INSTALLED


@lru_cache(maxsize=128)
def shrunk(url: str, side: int) -> Image.Image:
    """A photograph with a shorter side of `side` pixels."""
    image = open_header(read_url(url))
    image.draft("RGB", (2 * side, 2 * side))  # a JPEG is decoded no larger than needed: half of the time
    image = to_rgb(image)
    width, height = (round(length * side / min(image.size)) for length in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=3.0)


def drawn_squares(key: str, size: tuple[int, int]) -> list[tuple[int, int, int, int]]:
    """CHOICES squares (left, top, right, bottom), one or two patches wide; a function of key and size."""
    seed = int.from_bytes(hashlib.sha256(f"{VERSION} {key}".encode()).digest()[:8], "big")
    draws = np.random.Philox(np.random.SeedSequence(seed)).random_raw((CHOICES, 3)) / 2**64
    sides = (min(size) * (1 + draws[:, :1]) / SPAN).astype(int)
    corners = (draws[:, 1:] * (np.array(size) - sides + 1)).astype(int)
    return [(x, y, x + side, y + side) for x, y, side in np.hstack([corners, sides]).tolist()]


def contrast(square: Image.Image) -> float:
    """Mean difference of neighboring coarse colors: little in flat sky, and in a ramp from light to dark."""
    colors = np.asarray(square.resize((COARSE, COARSE), Image.Resampling.BOX), np.float64)
    return float(np.mean([np.abs(np.diff(colors, axis=axis)).mean() for axis in (0, 1)]))
