"""Description files of image folders: CSV, JSON lines or Parquet, rows of file, caption and class."""

import csv
import io
import json
from dataclasses import replace
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from components.data.errors import SourceError
from components.data.sources.columns import Columns, TableColumns, class_names, find_columns, first_caption
from components.runtime.storage.store import read_url


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
    """The rows of the description file at `url`.

    Each row is read from the first of its own columns with a meaning, so that JSON lines may name columns differently.
    Raises SourceError, in a line, for a file that can't be read or has no file names.
    """
    try:
        raw = _raw_rows(url)
    except (ValueError, AttributeError, csv.Error, pa.ArrowException) as error:
        raise SourceError(f"{url} can't be read ({error}); each line needs a file and a caption") from error
    table = find_columns(dict.fromkeys(name for row in raw for name in row), columns, url)
    read: set[str] = set()
    rows = [_row(number, row, table, read) for number, row in enumerate(raw, 1)]
    several = any(isinstance(row.get(name), list) for row in raw for name in table.caption)
    return Described(rows, replace(table, several=several), read)


def _raw_rows(url: str) -> list[dict[str, Any]]:
    data = read_url(url)
    if url.endswith(".parquet"):
        return _parquet_rows(data)
    content = data.decode("utf-8-sig")
    if not url.endswith(".csv"):
        rows = [json.loads(line) for line in content.splitlines() if line.strip()]
        if any(not isinstance(row, dict) for row in rows):
            raise ValueError("a line is no object")
        return rows
    reader, rows = csv.DictReader(io.StringIO(content)), []
    for row in reader:
        if None in row:
            raise ValueError(f"line {reader.line_num} has more fields than there are columns: quote those with commas")
        rows.append(row)
    return rows


def _parquet_rows(data: bytes) -> list[dict[str, Any]]:
    table = pq.read_table(io.BytesIO(data))
    rows = table.to_pylist()
    for column in table.column_names:
        if names := class_names(table.schema, column):
            for row in rows:
                row[column] = names[row[column]] if row[column] in range(len(names)) else None
    return rows


def _row(number: int, row: dict[str, Any], table: TableColumns, read: set[str]) -> Row:
    image, caption, label = (
        next((name for name in names if name in row), None) for names in (table.image, table.caption, table.label)
    )
    if image is None or not row[image] or (caption is None and label is None and (table.caption or table.label)):
        raise SourceError(
            f"{table.place} can't be read (row {number} has {', '.join(row) or 'nothing'}); "
            "each line needs a file and a caption"
        )
    read.update(name for name in (image, caption, label) if name is not None)
    return Row(
        str(row[image]),
        None if caption is None else first_caption(row[caption]),
        None if label is None or row[label] in (None, "") else str(row[label]),
    )
