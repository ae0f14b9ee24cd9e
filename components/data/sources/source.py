"""The interface of sources: a listing, a picklable reader, training files and columns by their names.

A set keeps a share of its own out of training (`holdout_fraction`, by the hash of each key), so of published sets with
splits only the training files are read; a glob reads others. Columns of tables are known by common names or the user's
choice. Nothing is passed over in silence: `TableColumns.note` names the columns left out.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import PurePosixPath
from typing import Literal, NamedTuple, Protocol

import pyarrow as pa
from PIL import Image

from components.configuration.config import Config
from components.data.listing import SourceError

NO_CLASS = "image"  # of sets without classes
ONE_CLASS = (NO_CLASS,)
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
    mark: str = ""  # of the file's version: a part of changed files is written again


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
    runs: tuple[int, ...] = ()  # lengths of runs that one task reads in order
    notes: tuple[str, ...] = ()  # lines for the user about unread parts of the source
    held_out_pairs: tuple[str, ...] = ()  # colors with shapes that no training image shows
    reading: tuple[str, ...] = ()  # the way of reading, where there was another once


def ordered_classes(names: Iterable[str]) -> tuple[str, ...]:
    """Class names in order: by the alphabet, numbers by size."""
    classes = set(names)
    numeric = all(name.isdecimal() for name in classes)
    return tuple(sorted(classes, key=lambda name: (int(name) if numeric else 0, name)))


def safe_keys(names: Sequence[str]) -> list[str]:
    """Unique WebDataset keys for file names, of at most MAX_KEY characters without dots and odd signs.
    A name that would share its key with another name gets a digest of itself, in any order of names."""
    plain = [re.sub(r"[^A-Za-z0-9_/-]+", "_", str(PurePosixPath(name).with_suffix(""))).strip("_/") for name in names]
    taken = Counter(key.lower() for key in plain)

    def unique(key: str, name: str) -> str:
        if taken[key.lower()] == 1 and 0 < len(key) <= MAX_KEY:
            return key
        return f"{key[: MAX_KEY - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"

    return list(map(unique, plain, names))


def split_word(path: str) -> str | None:
    """The split named in a path, such as `data/test-00000-of-00002.parquet`; the last name counts."""
    parts = [part.rpartition(".")[0] or part for part in reversed(path.split("/"))]
    words = (word.lower() for part in parts for word in re.split(r"[^A-Za-z]+", part))
    return next((WORDS[word] for word in words if word in WORDS), None)


def training_files(
    paths: Sequence[str], split_of: Callable[[str], str | None] = split_word
) -> tuple[list[str], str | None]:
    """The files to read (all, where none is named as training), and a line about splits left out."""
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


Meaning = Literal["image", "caption", "label"]
HUGGINGFACE = b"huggingface"
NAMES: dict[Meaning, tuple[str, ...]] = {  # the first that is there is read
    "image": (
        *("file", "file_name", "filename", "image_file_name", "image_file", "file_path", "filepath", "image_path"),
        *("path", "image", "images", "img", "photo", "image_name", "jpg", "jpeg", "png", "webp"),
        *("image_bytes", "img_bytes", "bytes", "pixel_values"),
    ),
    "caption": (
        *("caption", "text", "captions", "prompt", "description", "txt", "sentence", "sentences", "title", "alt_text"),
        *("caption_text", "image_description", "texts", "prompts", "descriptions"),
    ),
    "label": (
        *("class", "label", "labels", "category", "class_name", "label_name", "category_name", "cls", "classes"),
        *("class_label", "class_id", "label_id", "category_id", "categories", "fine_label", "coarse_label", "target"),
    ),
}


def class_names(schema: pa.Schema, column: str) -> tuple[str, ...]:
    """The names of a column of class numbers, from the schema's metadata; empty for any other column."""
    try:
        note = json.loads((schema.metadata or {}).get(HUGGINGFACE, b"{}"))
        feature = note.get("info", {}).get("features", {}).get(column)  # {"_type": "ClassLabel", "names": […]}
    except (ValueError, AttributeError):  # another program's note
        return ()
    if not isinstance(feature, dict) or feature.get("_type") != "ClassLabel":
        return ()
    return tuple(map(str, feature.get("names") or ()))


class Columns(Config):
    """The user's choice of columns; None: the first of the common names."""

    image: str | None = None  # of file names, or of the images themselves
    caption: str | None = None
    label: str | None = None


COMMON = Columns()  # all by their common names


@dataclass(frozen=True)
class TableColumns:
    """Columns of a table to read: for each meaning, in the order in which a row is searched."""

    place: str
    names: tuple[str, ...]
    columns: Mapping[Meaning, Sequence[str]]
    several: bool = False  # several captions a row; the first is read

    def first(self, meaning: Meaning) -> str | None:
        """The first column with a meaning, or None."""
        return next(iter(self.columns[meaning]), None)

    def note(self, read: Collection[str]) -> str | None:
        """A line that names the unread columns and their probable meanings; None if all were read.
        `read`: columns with a value for at least one row."""
        taken = {meaning: [name for name in names if name in read] for meaning, names in self.columns.items()}
        unread = [_guess(name, taken) for name in self.names if name not in read]
        unread += ["an image's captions but the first"] if self.several else []
        if not unread:
            return None
        origins = ", ".join(f"{meaning} from {' and '.join(names)}" for meaning, names in taken.items() if names)
        return (
            f"{self.place}: {origins}; not read: {', '.join(unread)} "
            "(`cascade data --label-column`, or images.columns.label in a recipe, names another; so image and caption)"
        )


def find_columns(
    names: Iterable[str], chosen: Columns, place: str, admitted: Mapping[Meaning, Sequence[str]] | None = None
) -> TableColumns:
    """The columns of a table by meaning. `admitted`: those of a fitting type; None: all.
    Raises SourceError for a chosen column that is missing or of another type."""
    names = tuple(names)
    columns: dict[Meaning, Sequence[str]] = {}
    for meaning, common in NAMES.items():
        fitting = names if admitted is None else admitted[meaning]
        choice: str | None = getattr(chosen, meaning)
        if choice is None:
            columns[meaning] = [name for other in common for name in fitting if _plain(name) == other]
        elif choice in fitting:
            columns[meaning] = [choice]
        elif choice in names:
            trouble = f"can't be read as {meaning}: its type does not fit; choose another of {', '.join(names)}"
            raise SourceError(f"{place}: column {choice!r} {trouble}")
        else:
            near = "".join(f", did you mean {name!r}?" for name in get_close_matches(choice, names, n=1))
            raise SourceError(f"{place}: column {choice!r} is not there{near or ';'} it has {', '.join(names)}")
    return TableColumns(place, names, columns)


def refuse_columns(chosen: Columns, place: str) -> None:
    """Raise SourceError for columns chosen of a source that is no table."""
    if named := [f"{name!r} for {meaning}" for meaning, name in chosen if name is not None]:
        raise SourceError(
            f"{place} is no table, and column {' and '.join(named)} is named: leave out --label-column and its like "
            "(in a recipe images.columns), which choose columns of Parquet files and of captions.csv or metadata"
        )


def first_caption(value: object) -> str:
    """A single caption from a cell: the first of several, "" for an empty cell."""
    if isinstance(value, list):
        value = value[0] if value else None
    return "" if value is None else str(value)


def _plain(name: str) -> str:
    return name.strip().lower().replace(" ", "_").replace("-", "_")


def _guess(name: str, taken: Mapping[Meaning, Sequence[str]]) -> str:
    meanings = {other: meaning for meaning, common in NAMES.items() for other in common}
    if meaning := meanings.get(_plain(name)):
        return f"{name} (another {meaning})" if taken[meaning] else f"{name} (of a type that is no {meaning})"
    near = next(iter(get_close_matches(name.lower(), meanings, n=1)), None)
    return name if near is None else f"{name} (near {near}: {meanings[near]}?)"
