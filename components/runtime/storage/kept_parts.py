"""Parts of a stage's work for later tries: files under fixed names, and a record of each part.

A record holds size and sha256 of the part's files when they were made, and facts from their maker; it is written
last. A later try adopts a part whose files still agree with its record, and makes any other part anew, also where the
record is damaged. A manifest takes a part's entries from the record, never from the files: no damage is taken for the
truth.
"""

import hashlib
from collections.abc import Iterable
from functools import partial
from typing import Any

from pydantic import Field, ValidationError

from components.configuration.config import Config
from components.runtime.storage.artifact import FileEntry, describe_bytes, verify_files
from components.runtime.storage.store import DamagedFileError, Store, in_parallel

RECORDS = "parts"  # folder of the records, next to the files


class Record(Config):
    """The record of a finished part."""

    recipe: str = ""  # digest of all that decides the part besides the key of its stage
    files: tuple[FileEntry, ...] = ()  # paths below the folder of the parts
    facts: dict[str, Any] = Field(default_factory=dict)  # from the part's maker


class Look(Config):
    """The state of a part after reading; both fields are empty for a part of another recipe."""

    record: Record | None = None  # of a whole part
    damage: str = ""  # of a damaged part: a line that names the file


def write_file(store: Store, path: str, data: bytes) -> FileEntry:
    """Write a file of a part. Returns the entry of `data`, whatever storage makes of the bytes."""
    store.write(path, data)
    return describe_bytes(data, path)


def write_record(store: Store, part: str, *files: FileEntry, recipe: str = "", **facts: Any) -> Record:
    """Finish a part after the files: write the record, with a sha256 of the record itself."""
    record = Record(recipe=recipe, files=files, facts=facts)
    content = record.model_dump_json().encode()
    store.write(record_path(part), hashlib.sha256(content).hexdigest().encode() + b"\n" + content)
    return record


def write_part(store: Store, part: str, path: str, data: bytes, **facts: Any) -> None:
    """Write a part of a single file, and the part's record."""
    write_record(store, part, write_file(store, path, data), **facts)


def read_record(store: Store, part: str) -> Record:
    """The record of a finished part.

    Raises FileNotFoundError for a part without a record, DamagedFileError for a record that has changed.
    """
    digest, _, content = store.read(record_path(part)).partition(b"\n")
    if hashlib.sha256(content).hexdigest().encode() != digest:
        raise DamagedFileError(f"{store.url(record_path(part))} differs from what was written")
    try:
        return Record.model_validate_json(content)
    except ValidationError as error:
        raise DamagedFileError(f"{store.url(record_path(part))} is no record of this version") from error


def read_records(store: Store, parts: Iterable[str]) -> list[Record]:
    """The records of several parts, in order. Raises as `read_record`."""
    return in_parallel(partial(read_record, store), parts)


def look_at(store: Store, part: str, *, recipe: str = "") -> Look:
    """Read all files of a recorded part and compare the files with the record.

    Raises FileNotFoundError for a part without a record, StoreError if storage can't be reached.
    """
    try:
        record = read_record(store, part)
    except DamagedFileError as error:
        return Look(damage=str(error))
    if record.recipe != recipe:
        return Look()
    damage = verify_files(store, record.files)
    return Look(damage=damage[0]) if damage else Look(record=record)


def recorded_parts(store: Store) -> set[str]:
    """Names of all parts with a record, whole or damaged."""
    return {info.path.removeprefix(f"{RECORDS}/").removesuffix(".json") for info in store.list(RECORDS)}


def record_path(part: str) -> str:
    """Path of a part's record, relative to the folder of the parts."""
    return f"{RECORDS}/{part}.json"
