"""Folders of images: class sub-folders, or a file with names, captions and classes at the top.

`captions.jsonl` and `captions.csv` at the top name files of the whole folder. Otherwise the layout of Hugging Face's
imagefolder is read: `train/`, `validation/` and `test/`, and `metadata.csv`, `.jsonl` or `.parquet` in any folder.
These files are tables, CSV, JSON lines or Parquet, of file, caption and class.
"""

import csv
import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from components.data.images import decode_sample, fit_square
from components.data.listing import FileVersion, SourceError, list_versions
from components.data.sources import source
from components.data.sources.source import COMMON, NO_CLASS, ONE_CLASS, Columns, Drawing, Item, Source, TableColumns
from components.data.tars import CONVERT, is_image, is_unread
from components.runtime.storage.connection import reason
from components.runtime.storage.store import Store, read_url

LICENSE = "unspecified"
CAPTIONS = ("captions.jsonl", "captions.csv")
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
OLD_COLUMNS = {"file", "file_name", "caption", "text", "class"}  # keys depend on the listing alone
RECODE = "save it as UTF-8, as with `iconv -f latin1 -t utf-8 FILE > captions.csv`"
FORMS = (
    "give it class sub-folders (PATH/cat/1.png), or captions.jsonl / captions.csv (metadata.csv too) at its top with "
    "the columns file, caption and, if you like, class"
)


class Row(NamedTuple):
    """An image in a description file."""

    file: str  # relative to the folder of the description file
    caption: str | None  # None: the file has no captions
    label: str | None  # None: the row has no class


class Described(NamedTuple):
    """The contents of a description file."""

    rows: list[Row]
    table: TableColumns
    read: set[str]  # columns with a value for at least one row


def read_rows(url: str, columns: Columns) -> Described:
    """The rows of the description file at `url`, each from the first of its own columns with a meaning.
    Raises SourceError for a file that can't be read or has no file names."""
    lacking = "each line needs a file and a caption"
    try:
        raw = _raw_rows(url)
    except UnicodeDecodeError as error:
        raise SourceError(f"{url} is not UTF-8 ({error}); {RECODE}") from error
    except (ValueError, AttributeError, csv.Error, pa.ArrowException) as error:
        raise SourceError(f"{url} can't be read ({error}); {lacking}") from error
    table = source.find_columns(dict.fromkeys(name for row in raw for name in row), columns, url)
    rows: list[Row] = []
    read: set[str] = set()
    for number, row in enumerate(raw, 1):
        image, caption, label = (next((n for n in names if n in row), None) for names in table.columns.values())
        wordless = caption is None and label is None and (table.columns["caption"] or table.columns["label"])
        if image is None or not row[image] or wordless:
            raise SourceError(f"{url} can't be read (row {number} has {', '.join(row) or 'nothing'}); {lacking}")
        read.update(filter(None, (image, caption, label)))
        named = None if label is None or row[label] in (None, "") else str(row[label])
        rows.append(Row(str(row[image]), None if caption is None else source.first_caption(row[caption]), named))
    several = any(isinstance(row.get(name), list) for row in raw for name in table.columns["caption"])
    return Described(rows, replace(table, several=several), read)


def _raw_rows(url: str) -> list[dict[str, Any]]:
    data = read_url(url)
    if url.endswith(".parquet"):
        try:
            table = pq.read_table(io.BytesIO(data))
        except OSError as error:  # of bytes in memory: Arrow's word for damage
            raise ValueError(reason(error)) from error
        rows = table.to_pylist()
        for column in table.column_names:
            names = source.class_names(table.schema, column)
            for row in rows if names else ():
                row[column] = names[row[column]] if row[column] in range(len(names)) else None
        return rows
    content = data.decode("utf-8-sig")
    if not url.endswith(".csv"):
        rows = [json.loads(line) for line in content.split("\n") if line.strip()]
        if any(not isinstance(row, dict) for row in rows):
            raise ValueError("a line is no object")
        return rows
    reader, rows = csv.DictReader(io.StringIO(content)), []
    if len(names := reader.fieldnames or []) == 1 and (other := re.search("[;\t|]", names[0])):
        raise ValueError(f"its columns are separated by {other[0]!r}; save it with commas")
    for row in reader:
        if None in row:
            raise ValueError(f"line {reader.line_num} has more fields than there are columns: quote those with commas")
        rows.append(row)
    return rows


@dataclass(frozen=True)
class FolderReader:
    """Reads an image file by its path below the folder."""

    path: str

    def read(self, item: Item) -> bytes:
        return read_url(Store(self.path).url(item.location))

    def draw(self, item: Item, data: bytes, *, resolution: int) -> Drawing:
        return Drawing(fit_square(decode_sample(data), resolution), details={"file": item.location})


class Names(NamedTuple):
    """The images of a folder."""

    all: list[str]
    used: list[str]  # images to train on
    root: str = ""  # the folder of the split, such as `train/`; "": the whole folder
    note: str | None = None  # a line about the splits read and left out


def list_folder(path: str, versions: Sequence[FileVersion] | None = None, columns: Columns = COMMON) -> Source:
    """Lists the images below `path` with classes and captions.
    `versions`: the result of `list_versions` at `path`, if called already. `columns`: of the file that describes the
    images. Raises SourceError if there is no file, no image, or a captions file that does not fit."""
    marks = {v.path: f"{v.bytes} {v.mark}" for v in (list_versions(path) if versions is None else versions)}
    listing = _listed(path, list(marks), columns)
    return replace(listing, items=tuple(item._replace(mark=marks[item.location]) for item in listing.items))


def _listed(path: str, files: list[str], columns: Columns) -> Source:
    images, unread = list(filter(is_image, files)), list(filter(is_unread, files))
    suffixes = {file.rpartition(".")[2].lower() for file in unread}
    kinds = " and ".join(f".{suffix}" for suffix in sorted(suffixes))
    left_out = f"{len(unread)} images are {kinds} and are not read: {CONVERT}" if unread else None
    if not images and left_out:
        raise SourceError(f"no images that can be read below {path}: {left_out}")
    if not images:
        kind = "; for Parquet say `cascade data parquet`" if any(name.endswith(".parquet") for name in files) else ""
        raise SourceError(f"no images below {path}{kind}; {FORMS}")
    for captions in CAPTIONS:
        if captions in files:
            return _described(path, Names(images, images, note=left_out), [captions], columns)
    names = _training_images(images)
    names = names._replace(note="; ".join(filter(None, (names.note, left_out))))
    near = {name for name in files if name.startswith(names.root) or "/" not in name}
    folders = sorted({name.rpartition("/")[0] for name in near if name.rpartition("/")[2] in METADATA})
    paths = [[f"{folder}/{name}" if folder else name for name in METADATA] for folder in folders]
    best = [next(path for path in candidates if path in near) for candidates in paths]  # of each folder
    if best:
        return _described(path, names, best, columns)
    source.refuse_columns(columns, path)
    return _sub_folders(path, names)


def _training_images(images: list[str]) -> Names:
    """The images below `train/`, if all images lie in folders of splits; otherwise all images."""
    splits = {top: source.split_word(top) for top in (name.partition("/")[0] if "/" in name else "" for name in images)}
    training = [top for top, split in splits.items() if split == "train"]
    if None in splits.values() or len(training) != 1:
        return Names(images, images)
    used, note = source.training_files(images, lambda name: splits[name.partition("/")[0]])
    return Names(images, used, f"{training[0]}/", note)


def _sub_folders(path: str, names: Names) -> Source:
    folder_of = {name: name[len(names.root) :].split("/")[0] for name in names.used if "/" in name[len(names.root) :]}
    classes, chosen = tuple(sorted(set(folder_of.values()))), list(folder_of or names.used)
    items = [
        Item(key, classes.index(folder_of[name]), folder_of[name].replace("_", " "), name)
        if classes
        else Item(key, 0, "", name)
        for key, name in zip(source.safe_keys(chosen), chosen, strict=True)
    ]
    notes, left = [], len(names.used) - len(items)
    if not classes:
        notes = [f"{path}: {len(items)} images without classes and captions, learned as they are; otherwise {FORMS}"]
    elif left:
        notes = [f"{path}: {left} images lie outside of the class folders and are left out"]
    return _source(path, names, classes or ONE_CLASS, items, notes, reading=(names.root,) if names.root else ())


def _described(path: str, names: Names, captions: Sequence[str], columns: Columns) -> Source:
    files = {name: read_rows(Store(path).url(name), columns) for name in captions}
    rows: dict[str, Row] = {}
    images = set(names.all)
    for name, described in files.items():
        folder, place = name.rpartition("/")[0], described.table.place
        rows_read = (row for row in described.rows if not is_unread(row.file))
        own = [row._replace(file=f"{folder}/{row.file}" if folder else row.file) for row in rows_read]
        missing = next((row.file for row in own if row.file not in images), None)
        if missing is not None or not own:
            raise SourceError(f"{place} names {missing or 'no image'}, which is not below {path}; correct the file")
        for row in own:
            if row.file in rows:
                raise SourceError(f"{place} names {row.file} twice; keep one line for each image")
            rows[row.file] = row
    used = set(names.used)
    training = [row for row in rows.values() if row.file in used]
    labels = [_class(row, names.root, captions) for row in training]
    if all(row.caption is None for row in training) and set(labels) <= {NO_CLASS}:
        place = Store(path).url(captions[0])
        raise SourceError(f"{place} has neither captions nor classes: each line needs a file and a caption or a class")
    read = set().union(*(described.read for described in files.values()))
    old = set(captions) <= set(CAPTIONS) and read <= OLD_COLUMNS
    classes = tuple(sorted(set(labels))) if old else source.ordered_classes(labels)
    items = [
        Item(key, classes.index(label), label.replace("_", " ") if row.caption is None else row.caption, row.file)
        for key, row, label in zip(source.safe_keys([row.file for row in training]), training, labels, strict=True)
    ]
    left = len(used - rows.keys())
    notes = [f"{path}: {left} images are not named in {', '.join(captions)} and are left out"] if left else []
    notes += filter(None, (described.table.note(described.read) for described in files.values()))
    return _source(path, names, classes, items, notes, reading=() if old else (names.root, *captions, *sorted(read)))


def _class(row: Row, root: str, captions: Sequence[str]) -> str:
    """The row's class; without a class the name of the sub-folder, as imagefolder has it."""
    if row.label is not None:
        return row.label
    folder, separator, _ = row.file[len(root) :].partition("/")
    return folder if separator and captions[0] not in CAPTIONS else NO_CLASS


def _source(
    path: str, names: Names, classes: tuple[str, ...], items: list[Item], notes: list[str], reading: tuple[str, ...]
) -> Source:
    splits = [f"{path}: {names.note}"] if names.note else []
    reader = FolderReader(path)
    return Source("folder", LICENSE, classes, tuple(items), reader, notes=(*splits, *notes), reading=reading)
