"""The interface of sources: a listing for the ingest, a picklable reader, training files by name.

A set keeps a share of its own out of training (`holdout_fraction`, by the hash of each key), so of published sets with
splits only the training files are read; the splits left out are named, and a glob reads them.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import NamedTuple, Protocol

from PIL import Image

MAX_KEY = 90  # the tar format's name field holds 100 characters
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
WORDS = {word: split for split, words in SPLITS.items() for word in words}


class Item(NamedTuple):
    """An image in a listing. `location` is for the reader alone."""

    key: str
    label: int
    caption: str
    location: str


@dataclass(frozen=True)
class Drawing:
    """An image in the form that will be stored."""

    image: Image.Image  # RGB, resolution x resolution
    members: dict[str, bytes] = field(default_factory=dict)  # further members of the sample, by suffix
    details: dict[str, object] = field(default_factory=dict)  # for the `json` member


class Reader(Protocol):
    """Draws items in any process. `read` raises if storage fails; `draw` raises if the image is corrupt."""

    def read(self, item: Item) -> bytes: ...

    def draw(self, item: Item, data: bytes, *, resolution: int) -> Drawing: ...


@dataclass(frozen=True)
class Source:
    """A listing of images, with the reader that draws them."""

    name: str
    license: str
    classes: tuple[str, ...]
    items: tuple[Item, ...]
    reader: Reader
    runs: tuple[int, ...] = ()  # lengths of runs of items that one task reads in order; none: each item by itself
    notes: tuple[str, ...] = ()  # lines for the user about unread parts of the source
    reading: tuple[str, ...] = ()  # the way of reading, for files that were once read in another way


def ordered_classes(names: Iterable[str]) -> tuple[str, ...]:
    """Class names in order: by the alphabet, numbers by size."""
    classes = set(names)
    numeric = all(name.isdigit() for name in classes)
    return tuple(sorted(classes, key=lambda name: (int(name) if numeric else 0, name)))


def safe_keys(names: Sequence[str]) -> list[str]:
    """Unique WebDataset keys for file names.

    Keys have no dots (webdataset's groups end at the first), no odd characters, and at most MAX_KEY characters. A name
    that would share its key with another name gets a digest of itself, in any order of names.
    """
    plain = [re.sub(r"[^A-Za-z0-9_/-]+", "_", str(PurePosixPath(name).with_suffix(""))).strip("_/") for name in names]
    taken = Counter(key.lower() for key in plain)
    return [
        key
        if taken[key.lower()] == 1 and 0 < len(key) <= MAX_KEY
        else f"{key[: MAX_KEY - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
        for key, name in zip(plain, names, strict=True)
    ]


def split_word(path: str) -> str | None:
    """The split named in a path, such as `data/test-00000-of-00002.parquet`; the last name counts."""
    parts = [part.rpartition(".")[0] or part for part in reversed(path.split("/"))]
    words = (word.lower() for part in parts for word in re.split(r"[^A-Za-z]+", part))
    return next((WORDS[word] for word in words if word in WORDS), None)


def training_files(
    paths: Sequence[str], split_of: Callable[[str], str | None] = split_word
) -> tuple[list[str], str | None]:
    """The files to read, and a line about the splits read and left out; no line if all are read.

    All files are read where none is named as training.
    """
    by_split: dict[str | None, list[str]] = {}
    for path in paths:
        by_split.setdefault(split_of(path), []).append(path)
    if "train" not in by_split or len(by_split) == 1:
        return list(paths), None
    counts = {name or "the rest": f"{len(files):,} file{'s' * (len(files) > 1)}" for name, files in by_split.items()}
    others = " and ".join(f"{name} ({count})" for name, count in counts.items() if name != "train")
    return by_split["train"], (
        f"train is read ({counts['train']}) and {others} is not: holdout_fraction of train is held out of training; "
        "to read others, name their folder or a glob"
    )
