"""Columns of tables that hold images, captions and classes, by common names or the user's choice.

Nothing is passed over in silence: `TableColumns.note` names the columns read and the columns left out.
"""

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal

import pyarrow as pa

from components.configuration.config import Config
from components.data.listing import SourceError

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

        Args:
            read: columns with a value for at least one row.
        """
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
    """The columns of a table by meaning.

    Args:
        admitted: the columns of a fitting type for each meaning; all columns if left out.

    Raises SourceError for a chosen column that is missing or of another type.
    """
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


def first_caption(value: object) -> str:
    """A single caption from a cell: the first of several, "" for an empty cell."""
    if isinstance(value, list):
        value = value[0] if value else None
    return "" if value is None else str(value)


def _plain(name: str) -> str:
    return name.strip().lower().replace(" ", "_").replace("-", "_")


def _guess(name: str, taken: Mapping[Meaning, Sequence[str]]) -> str:
    """An unread column with its probable meaning."""
    meanings = {other: meaning for meaning, common in NAMES.items() for other in common}
    if meaning := meanings.get(_plain(name)):
        return f"{name} (another {meaning})" if taken[meaning] else f"{name} (of a type that is no {meaning})"
    near = next(iter(get_close_matches(name.lower(), meanings, n=1)), None)
    return name if near is None else f"{name} (near {near}: {meanings[near]}?)"
