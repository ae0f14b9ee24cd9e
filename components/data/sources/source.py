"""What every source of images gives to the ingest: a listing, and a small picklable reader that draws its items."""

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import NamedTuple, Protocol

from PIL import Image

MAX_KEY = 90  # the tar format's name field holds 100 characters


class Item(NamedTuple):
    """One image to come. `location` is the reader's own way to find it."""

    key: str
    label: int
    caption: str
    location: str


@dataclass(frozen=True)
class Drawing:
    """An image as it will be stored."""

    image: Image.Image  # RGB, resolution x resolution
    members: dict[str, bytes] = field(default_factory=dict)  # further members of the sample, by suffix
    details: dict[str, object] = field(default_factory=dict)  # for the `json` member


class Reader(Protocol):
    """Draws items in any process. `read` raises if storage fails; `draw` raises if the image is corrupt."""

    def read(self, item: Item) -> bytes: ...

    def draw(self, item: Item, data: bytes, *, resolution: int) -> Drawing: ...


@dataclass(frozen=True)
class Source:
    """A listing of images that a reader can draw."""

    name: str
    license: str
    classes: tuple[str, ...]
    items: tuple[Item, ...]
    reader: Reader
    runs: tuple[int, ...] = ()  # lengths of runs of items that one task reads in order; none: each item by itself
    notes: tuple[str, ...] = ()  # what of the source is not read, each a line for the user
    reading: tuple[str, ...] = ()  # how the files are read, where the same files have been read otherwise before


def ordered_classes(names: Iterable[str]) -> tuple[str, ...]:
    """Class names in their order: by the alphabet, numbers by their size."""
    found = set(names)
    numeric = all(name.isdigit() for name in found)
    return tuple(sorted(found, key=lambda name: (int(name) if numeric else 0, name)))


def safe_keys(names: Sequence[str]) -> list[str]:
    """Unique WebDataset keys for file names: no dots (webdataset's groups end at the first), no odd characters, not
    too long. A name that would share its key with another gets a digest of itself, whatever the order."""
    plain = [re.sub(r"[^A-Za-z0-9_/-]+", "_", str(PurePosixPath(name).with_suffix(""))).strip("_/") for name in names]
    taken = Counter(key.lower() for key in plain)
    return [
        key if taken[key.lower()] == 1 and 0 < len(key) <= MAX_KEY else f"{key[: MAX_KEY - 9]}-{_digest(name)}"
        for key, name in zip(plain, names, strict=True)
    ]


def _digest(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()[:8]
