"""Which columns of a table hold images, captions and classes: by common names, or as the user says.

Nothing is passed over in silence: `TableColumns.note` names what was read and what was not.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal, get_args

from components.configuration.config import Config
from components.data.errors import SourceError

Meaning = Literal["image", "caption", "label"]
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


class Columns(Config):
    """Columns that the user chose; None: the first of the common names."""

    image: str | None = None  # of file names, or of the images themselves
    caption: str | None = None
    label: str | None = None


COMMON = Columns()  # all by their common names


@dataclass(frozen=True)
class TableColumns:
    """The columns of one table that are read, for each meaning in the order in which a row is searched for it."""

    place: str
    names: tuple[str, ...]
    image: tuple[str, ...]
    caption: tuple[str, ...]
    label: tuple[str, ...]
    several: bool = False  # captions a row, of which the first is read

    def first(self, meaning: Meaning) -> str | None:
        found: tuple[str, ...] = getattr(self, meaning)
        return found[0] if found else None

    def note(self, read: Collection[str]) -> str | None:
        """One line that names the columns which were not read and what each might have been; None if all were.

        Args:
            read: the columns that at least one row was read from.
        """
        taken = {meaning: [name for name in getattr(self, meaning) if name in read] for meaning in NAMES}
        unread = [_guess(name, taken) for name in self.names if name not in read]
        unread += ["an image's captions but the first"] if self.several else []
        if not unread:
            return None
        said = ", ".join(f"{meaning} from {' and '.join(names)}" for meaning, names in taken.items() if names)
        return (
            f"{self.place}: {said}; not read: {', '.join(unread)} "
            "(`cascade data --label-column`, or images.columns.label in a recipe, names another; so image and caption)"
        )


def find_columns(
    names: Iterable[str], chosen: Columns, place: str, admitted: Mapping[Meaning, Sequence[str]] | None = None
) -> TableColumns:
    """The columns of a table by meaning.

    Args:
        admitted: the columns whose type fits a meaning; any may have it if left out.

    Raises SourceError for a chosen column that is not there or of a type that does not fit.
    """
    names = tuple(names)
    found: dict[Meaning, tuple[str, ...]] = {}
    for meaning in get_args(Meaning):
        fitting = names if admitted is None else tuple(admitted[meaning])
        wanted: str | None = getattr(chosen, meaning)
        if wanted is None:
            found[meaning] = tuple(name for known in NAMES[meaning] for name in fitting if _is(name, known))
        elif wanted in fitting:
            found[meaning] = (wanted,)
        else:
            raise SourceError(f"{place}: column {wanted!r} {_trouble(wanted, meaning, names)}")
    return TableColumns(place, names, found["image"], found["caption"], found["label"])


def first_caption(value: object) -> str:
    """A cell of captions as one caption: of several the first, of none an empty one."""
    if isinstance(value, list):
        value = value[0] if value else None
    return "" if value is None else str(value)


def _is(name: str, known: str) -> bool:
    return name.strip().lower().replace(" ", "_").replace("-", "_") == known


def _trouble(wanted: str, meaning: Meaning, names: Sequence[str]) -> str:
    if wanted in names:
        return f"can't be read as {meaning}: its type does not fit; choose another of {', '.join(names)}"
    near = "".join(f", did you mean {name!r}?" for name in get_close_matches(wanted, names, n=1))
    return f"is not there{near or ';'} it has {', '.join(names)}"


def _guess(name: str, taken: dict[Meaning, list[str]]) -> str:
    """An unread column with what it might have been."""
    for meaning, known in NAMES.items():
        if any(_is(name, other) for other in known):
            return f"{name} (another {meaning})" if taken[meaning] else f"{name} (of a type that is no {meaning})"
    meanings = {known: meaning for meaning, all_known in NAMES.items() for known in all_known}
    for near in get_close_matches(name.lower(), meanings, n=1):
        return f"{name} (near {near}: {meanings[near]}?)"
    return name
