"""Parquet files of images, in the form of Hugging Face's `datasets`: `{bytes, path}`, class, caption.
Bytes alone are read as an image too. The unit of reading is the row group: groups are taken in an order by hash, so
that a shard holds rows of several places of the set, and each is read once, a few rows at a time."""

import fnmatch
import logging
import posixpath
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import accumulate, islice, pairwise
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from components.data.images import decode_sample, fit_square
from components.data.listing import FileVersion, SourceError, list_versions
from components.data.shards import order_of
from components.data.sources import source
from components.data.sources.webdataset import split_glob
from components.runtime.storage.connection import at, connect, reason, retried
from components.runtime.storage.store import Store, in_parallel

logger = logging.getLogger(__name__)

LICENSE = "unspecified"
SUFFIX = ".parquet"
ROWS = 32  # in memory at a time
BUFFER = 4 * 2**20  # bytes of a column to fetch at a time
NO_LABEL = -1  # of rows without a class: quarantined


@dataclass(frozen=True)
class ParquetReader:
    """Reads the image of `item.location`: file, row group, and row within the group."""

    path: str
    column: str  # of bytes

    def read(self, item: source.Item) -> bytes:
        file, group, row = item.location.rsplit(":", 2)
        url = Store(self.path).url(file)
        rows = open_rows(url, int(group), self.column)
        return retried(lambda: rows.at(int(row)), url)

    def draw(self, item: source.Item, data: bytes, *, resolution: int) -> source.Drawing:
        if item.label == NO_LABEL:
            raise ValueError("the row has no class")
        if not data:
            raise ValueError("the row holds no bytes of an image")
        file, group, row = item.location.rsplit(":", 2)
        details: dict[str, object] = {"file": file, "row_group": int(group), "row": int(row)}
        return source.Drawing(fit_square(decode_sample(data), resolution), details=details)


class RowGroup:
    """The cells of a column in a row group, for reading in order; an earlier row opens the group again."""

    def __init__(self, url: str, group: int, column: str) -> None:
        self.url, self.group, self.column = url, group, column
        self.cells: Iterator[bytes] = iter(())
        self.next = -1  # the next row; -1: not open

    def at(self, row: int) -> bytes:
        """The bytes of a row, b"" of an empty cell. Raises SourceError for damage in the file."""
        if not 0 <= self.next <= row:
            self.cells, self.next = self._open(), 0
        ahead, self.next = row - self.next, -1  # not open any more where reading fails
        with damage_named(f"{self.url}, row group {self.group}: can't be read"):
            cell = next(islice(self.cells, ahead, None))
        self.next = row + 1
        return cell

    def _open(self) -> Iterator[bytes]:
        file = open_parquet(self.url, buffer_size=BUFFER)
        for batch in file.iter_batches(batch_size=ROWS, row_groups=[self.group], columns=[self.column]):
            column = batch.column(0)
            for cell in column.field("bytes") if pa.types.is_struct(column.type) else column:
                yield cell.as_py() or b""


open_rows = lru_cache(maxsize=1)(RowGroup)


@contextmanager
def damage_named(fault: str) -> Iterator[None]:
    """Raises SourceError for Parquet's error about a damaged file, not for one of network or disk."""
    try:
        yield
    except Exception as error:
        if isinstance(error, pa.ArrowException) or (type(error) is OSError and error.errno is None):
            raise SourceError(f"{fault} ({reason(error)}); copy the file again") from error
        raise


def open_parquet(url: str, *, buffer_size: int = 0) -> pq.ParquetFile:
    """Opens the Parquet file at `url` and reads the footer.
    Raises SourceError for another kind of file, FileNotFoundError for a missing one."""
    filesystem, path = connect(url)
    with damage_named(f"{url} can't be read as Parquet"):
        return pq.ParquetFile(filesystem.open(path, "rb", cache_type="none"), buffer_size=buffer_size)


class ParquetSet(NamedTuple):
    """Parquet files to read, and their columns."""

    folder: str  # URL of the deepest folder with all files
    files: tuple[FileVersion, ...]  # paths relative to it
    table: source.TableColumns
    notes: tuple[str, ...]


class FileRows(NamedTuple):
    """The R rows of a file without images."""

    groups: tuple[int, ...]  # rows of each row group
    names: tuple[str, ...]  # class names for numbers in `labels`; empty: it holds names
    labels: list[object] | None  # (R,)  None: the set has no classes
    captions: list[object] | None  # (R,)  each a caption, a list of them, or None


def is_parquet(path: str) -> bool:
    """True for the path of a file of images, not of a description of a folder's images."""
    return path.endswith(SUFFIX) and path.rpartition("/")[2] != "metadata.parquet"


def find_parquet(path: str, columns: source.Columns = source.COMMON) -> ParquetSet:
    """The Parquet files at a folder, glob or file, with columns by the first file's footer.
    Of a folder with splits only the training files. Raises SourceError for no file, or columns that don't fit."""
    folder, pattern = split_glob(path)
    found = [version for version in list_versions(folder) if fnmatch.fnmatchcase(version.path, pattern or "*")]
    if folder.endswith(SUFFIX) and at(folder, lambda system, name: system.isfile(name)):  # Spark's are folders
        folder = folder.rpartition("/")[0]
    tables = {version.path: version for version in found if is_parquet(version.path)}
    if not tables:
        raise SourceError(f"no Parquet files at {path}; give their folder, or a glob such as s3://bucket/set/*.parquet")
    names, split = (list(tables), None) if pattern else source.training_files(list(tables))
    below = posixpath.commonpath([posixpath.dirname(name) for name in names])
    root = Store(folder).url(below)
    files = tuple(tables[name]._replace(path=posixpath.relpath(name, below or ".")) for name in names)
    table = _columns(Store(root).url(files[0].path), columns)
    notes = (f"{path}: {split}" if split else None, table.note(set(filter(None, map(table.first, source.NAMES)))))
    return ParquetSet(root, files, table, tuple(filter(None, notes)))


def list_parquet(path: str, columns: source.Columns = source.COMMON, *, most_files: int | None = None) -> source.Source:
    """Lists the rows of all files, or of the first `most_files`.
    Rows without a class are quarantined when drawn.
    Raises SourceError for a file that can't be read, or has other columns than the first file."""
    chosen = find_parquet(path, columns)
    chosen = chosen._replace(files=chosen.files[:most_files])
    urls = [Store(chosen.folder).url(version.path) for version in chosen.files]
    files = in_parallel(lambda url: retried(partial(_labels_and_captions, url, chosen.table), url), urls)
    if len({file.names for file in files}) > 1:
        raise SourceError(
            f"the files in {chosen.folder} name their classes differently; read them as sets of their own"
        )
    names = {str(label) for file in files if not file.names for label in file.labels or () if label is not None}
    classes = files[0].names or source.ordered_classes(names) or source.ONE_CLASS
    runs = [run for v, file in zip(chosen.files, files, strict=True) for run in _runs(v, file, classes)]
    if not runs:
        raise SourceError(f"the Parquet files at {path} have no rows; give others")
    labels = [item.label for run in runs for item in run]
    expected = len(labels) * (1 - sum((count / len(labels)) ** 2 for count in Counter(labels).values()))
    if sum(one != other for one, other in pairwise(labels)) < expected / 10:  # of a shuffled set
        logger.warning("%s: rows lie sorted by class, so that batches mix few of them; write them shuffled", path)
    runs.sort(key=lambda run: order_of(run[0].key))
    items = [item for run in runs for item in run]
    keyed = (
        item._replace(key=key) for item, key in zip(items, source.safe_keys([item.key for item in items]), strict=True)
    )
    reader, lengths = ParquetReader(chosen.folder, str(chosen.table.first("image"))), tuple(map(len, runs))
    return source.Source("parquet", LICENSE, classes, tuple(keyed), reader, runs=lengths, notes=chosen.notes)


def _columns(url: str, columns: source.Columns) -> source.TableColumns:
    """The columns of a file to read. Raises SourceError for no images, or neither class nor caption."""
    schema = retried(partial(open_parquet, url), url).schema_arrow
    kinds = zip(source.NAMES, (_is_image, _is_text, _is_class), strict=True)
    admitted = {meaning: [field.name for field in schema if fits(field.type)] for meaning, fits in kinds}
    table = source.find_columns(schema.names, columns, url, admitted)
    types = {field.name: "struct" if pa.types.is_struct(field.type) else str(field.type) for field in schema}
    there = ", ".join(f"{name} ({kind})" for name, kind in types.items())
    if not table.first("image") and len(admitted["image"]) == 1:
        table = replace(table, columns={**table.columns, "image": admitted["image"]})
    if not table.first("image"):
        which = "which column holds the images" if admitted["image"] else "no column of images, {bytes, path} or bytes,"
        raise SourceError(f"{url}: {which} among {there}? name it by --image-column, or images.columns.image")
    caption = table.first("caption")
    if caption is None and table.first("label") is None and len(schema.names) > 1:
        remedy = "name one by --label-column or --caption-column, or images.columns.label or .caption"
        raise SourceError(f"{url}: neither a class nor a caption among {there}; {remedy}")
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


def _labels_and_captions(url: str, table: source.TableColumns) -> FileRows:
    image, caption, label = map(table.first, source.NAMES)
    file = open_parquet(url)
    schema, metadata = file.schema_arrow, file.metadata
    for name in filter(None, (image, label, caption)):
        if name not in schema.names:
            raise SourceError(f"{url} has no column {name!r}, which {table.place} has; write them alike")
    with damage_named(f"{url} can't be read as Parquet"):
        read = file.read(columns=[name for name in (label, caption) if name])
    return FileRows(
        tuple(metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)),
        source.class_names(schema, label) if label else (),
        read.column(label).to_pylist() if label else None,
        read.column(caption).to_pylist() if caption else None,
    )


def _runs(version: FileVersion, file: FileRows, classes: tuple[str, ...]) -> Iterator[list[source.Item]]:
    """Yields the rows of each row group as items, in order; keys are not safe yet."""
    numbers, path = {name: place for place, name in enumerate(classes)}, version.path

    def item(group: int, start: int, row: int) -> source.Item:
        cell = None if file.labels is None else file.labels[row]
        if file.names:
            label = cell if isinstance(cell, int) and 0 <= cell < len(file.names) else NO_LABEL
        else:
            label = 0 if file.labels is None else NO_LABEL if cell is None else numbers.get(str(cell), NO_LABEL)
        named = "" if label == NO_LABEL else classes[label].replace("_", " ")
        caption = named if file.captions is None else source.first_caption(file.captions[row])
        key, location = f"{path.removesuffix(SUFFIX)}/{row:06d}", f"{path}:{group}:{row - start}"
        return source.Item(key, label, caption, location, f"{version.bytes} {version.mark}")

    for group, (start, stop) in enumerate(pairwise(accumulate(file.groups, initial=0))):
        if stop > start:
            yield [item(group, start, row) for row in range(start, stop)]
