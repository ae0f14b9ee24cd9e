"""What every source of images gives to the ingest: a listing, and a small picklable reader that draws its items."""

import hashlib
import re
from collections import Counter
from collections.abc import Sequence
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
