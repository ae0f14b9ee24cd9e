"""Parquet files of images, as Hugging Face's `datasets` writes them: `{bytes, path}` or bytes, a class, a caption.

The unit of reading is the row group: these are taken in an order by hash, so that a shard holds rows of several places
of the set, and each is read once.
"""

import fnmatch
import logging
import posixpath
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate, pairwise
from typing import NamedTuple

import pyarrow as pa

from components.data.errors import SourceError
from components.data.listing import FileVersion, list_versions
from components.data.shards import order_of
from components.data.sources.columns import COMMON, NAMES, Columns, Meaning, TableColumns, find_columns, first_caption
from components.data.sources.features import class_names
from components.data.sources.parquet_rows import NO_LABEL, ParquetReader, is_damage, open_parquet
from components.data.sources.source import Item, Source, ordered_classes, safe_keys
from components.data.sources.splits import training_files
from components.data.sources.webdataset import split_glob
from components.runtime.storage.connection import reason, retried
from components.runtime.storage.store import Store, in_parallel

logger = logging.getLogger(__name__)

LICENSE = "unspecified"
SUFFIX = ".parquet"
NO_CLASS = "image"


class ParquetSet(NamedTuple):
    """The files that are read, and their columns."""

    folder: str  # URL of the deepest folder that holds all of them
    files: tuple[FileVersion, ...]  # paths relative to it
    table: TableColumns
    notes: tuple[str, ...]


class FileRows(NamedTuple):
    """All that is known of one file without its images: R rows in row groups."""

    groups: tuple[int, ...]  # rows of each
    names: tuple[str, ...]  # what the numbers in `labels` stand for; empty: they are names themselves
    labels: list[object] | None  # (R,)  None: the set has no classes
    captions: list[object] | None  # (R,)  each a caption, a list of them, or None


def is_parquet(path: str) -> bool:
    """Whether it is a file of images, not one that describes the images of a folder."""
    return path.endswith(SUFFIX) and path.rpartition("/")[2] != "metadata.parquet"


def find_parquet(path: str, columns: Columns = COMMON) -> ParquetSet:
    """The files in a folder, of a glob, or the one at `path`, and their columns by the first file's footer.

    Of a folder with splits those to train on. Raises SourceError if there is none, or its columns don't fit.
    """
    folder, pattern = split_glob(path)
    versions = list_versions(folder)
    if folder.endswith(SUFFIX):  # the file itself
        folder = folder.rpartition("/")[0]
    found = {
        version.path: version
        for version in versions
        if is_parquet(version.path) and fnmatch.fnmatchcase(version.path, pattern or "*")
    }
    if not found:
        raise SourceError(f"no Parquet files at {path}; give their folder, or a glob such as s3://bucket/set/*.parquet")
    names, split = (list(found), None) if pattern else training_files(list(found))
    below = posixpath.commonpath([posixpath.dirname(name) for name in names])
    root = Store(folder).url(below)
    files = tuple(found[name]._replace(path=posixpath.relpath(name, below or ".")) for name in names)
    table = _columns(Store(root).url(files[0].path), columns)
    read = {name for name in (table.first("image"), table.first("caption"), table.first("label")) if name}
    notes = (f"{path}: {split}" if split else None, table.note(read))
    return ParquetSet(root, files, table, tuple(note for note in notes if note))


def list_parquet(path: str, columns: Columns = COMMON) -> Source:
    """The rows of all files with their classes and captions; images are left alone.

    Rows without a class are listed too, and quarantined when they are drawn. Raises SourceError if a file can't be
    read, or if its columns are not those of the first.
    """
    found = find_parquet(path, columns)
    files = in_parallel(partial(_read_file, found), found.files)
    if len({file.names for file in files}) > 1:
        raise SourceError(f"the files in {found.folder} name their classes differently; read them as sets of their own")
    names = {str(label) for file in files if not file.names for label in file.labels or () if label is not None}
    classes = files[0].names or ordered_classes(names) or (NO_CLASS,)
    runs = [run for version, file in zip(found.files, files, strict=True) for run in _runs(version.path, file, classes)]
    if not runs:
        raise SourceError(f"the Parquet files at {path} have no rows; give others")
    if _is_sorted([item.label for run in runs for item in run]):
        logger.warning("%s: rows lie sorted by class, so that batches mix few of them; write them shuffled", path)
    runs.sort(key=lambda run: order_of(run[0].key))
    items = [item for run in runs for item in run]
    keyed = (item._replace(key=key) for item, key in zip(items, safe_keys([item.key for item in items]), strict=True))
    reader = ParquetReader(found.folder, str(found.table.first("image")))
    return Source("parquet", LICENSE, classes, tuple(keyed), reader, runs=tuple(map(len, runs)), notes=found.notes)


def _is_sorted(labels: Sequence[int]) -> bool:
    """Whether the class changes from row to row a tenth as often as it would in a shuffled set, or less."""
    shares = [count / len(labels) for count in Counter(labels).values()]
    expected = len(labels) * (1 - sum(share * share for share in shares))
    return sum(one != other for one, other in pairwise(labels)) < expected / 10


def _columns(url: str, columns: Columns) -> TableColumns:
    """The columns to read of a file. Raises SourceError, in one line, if there are no images, or nothing to condition
    on."""
    schema = open_parquet(url).schema_arrow
    fits: dict[Meaning, Callable[[pa.DataType], bool]] = {"image": _is_image, "caption": _is_text, "label": _is_class}
    admitted = {meaning: [field.name for field in schema if fit(field.type)] for meaning, fit in fits.items()}
    table = find_columns(schema.names, columns, url, admitted)
    there = ", ".join(f"{field.name} ({_type_name(field.type)})" for field in schema)
    if not table.image and len(admitted["image"]) == 1:
        table = replace(table, image=tuple(admitted["image"]))
    if not table.image:
        which = "which column holds the images" if admitted["image"] else "no column of images, {bytes, path} or bytes,"
        raise SourceError(f"{url}: {which} among {there}? name it by --image-column, or images.columns.image")
    if not table.label and not table.caption:
        raise SourceError(
            f"{url}: neither a class nor a caption among {there}; name one by --label-column or --caption-column, or "
            "images.columns.label or .caption"
        )
    caption = table.first("caption")
    return replace(table, several=caption is not None and pa.types.is_nested(schema.field(caption).type))


def _is_image(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _is_image(kind.field("bytes").type)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _is_text(kind.value_type)
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _is_class(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return _is_class(kind.value_type)
    return pa.types.is_integer(kind) or pa.types.is_boolean(kind) or (_is_text(kind) and not pa.types.is_nested(kind))


def _type_name(kind: pa.DataType) -> str:
    return "struct" if pa.types.is_struct(kind) else str(kind)


def _read_file(found: ParquetSet, version: FileVersion) -> FileRows:
    url = Store(found.folder).url(version.path)
    return retried(partial(_labels_and_captions, url, found.table), url)


def _labels_and_captions(url: str, table: TableColumns) -> FileRows:
    image, caption, label = (table.first(meaning) for meaning in NAMES)
    file = open_parquet(url)
    schema, metadata = file.schema_arrow, file.metadata
    for name in filter(None, (image, label, caption)):
        if name not in schema.names:
            raise SourceError(f"{url} has no column {name!r}, which {table.place} has; write them alike")
    try:
        read = file.read(columns=[name for name in (label, caption) if name])
    except Exception as error:
        if not is_damage(error):
            raise
        raise SourceError(f"{url} can't be read as Parquet ({reason(error)}); copy it again") from error
    return FileRows(
        tuple(metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)),
        class_names(schema, label) if label else (),
        read.column(label).to_pylist() if label else None,
        read.column(caption).to_pylist() if caption else None,
    )


def _runs(path: str, file: FileRows, classes: tuple[str, ...]) -> Iterator[list[Item]]:
    """The rows of each row group as items, in their order; their keys are not safe yet."""
    number = {name: place for place, name in enumerate(classes)}
    starts = accumulate(file.groups, initial=0)
    for group, (start, stop) in enumerate(pairwise(starts)):
        run = []
        for row in range(start, stop):
            label = _label(file, row, number)
            named = "" if label == NO_LABEL else classes[label].replace("_", " ")
            caption = named if file.captions is None else first_caption(file.captions[row])
            run.append(Item(f"{path.removesuffix(SUFFIX)}/{row:06d}", label, caption, f"{path}:{group}:{row - start}"))
        if run:
            yield run


def _label(file: FileRows, row: int, number: dict[str, int]) -> int:
    if file.labels is None:
        return 0
    label = file.labels[row]
    if file.names:
        return label if isinstance(label, int) and 0 <= label < len(file.names) else NO_LABEL
    return number.get(str(label), NO_LABEL) if label is not None else NO_LABEL
