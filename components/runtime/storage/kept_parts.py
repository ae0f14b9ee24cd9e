"""Parts of a stage's work that outlive the try that made them: files under fixed names, and a record of each part.

A record says size and sha256 of the part's files as they were made, and what else their maker tells; it is written
last. A later try adopts a part whose files still are what its record says, and makes any other anew, one with a damaged
record too. What a manifest lists of a part is its record, never what lies there: no damage is taken for the truth.
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
    """One finished part."""

    recipe: str = ""  # digest of what decides the part besides the key of its stage
    files: tuple[FileEntry, ...] = ()  # paths below the folder of the parts
    facts: dict[str, Any] = Field(default_factory=dict)  # what its maker tells


class Look(Config):
    """The state of a part that was read; both fields are empty where another recipe decides it."""

    record: Record | None = None  # of one that is whole
    damage: str = ""  # of one that is not: a line that names the file


def write_file(store: Store, path: str, data: bytes) -> FileEntry:
    """Write a file of a part. Returns its entry, which is of these bytes, whatever becomes of them."""
    store.write(path, data)
    return describe_bytes(data, path)


def write_record(store: Store, part: str, *files: FileEntry, recipe: str = "", **facts: Any) -> Record:
    """Finish a part whose files are written."""
    record = Record(recipe=recipe, files=files, facts=facts)
    content = record.model_dump_json().encode()
    store.write(record_path(part), hashlib.sha256(content).hexdigest().encode() + b"\n" + content)
    return record


def write_part(store: Store, part: str, path: str, data: bytes, **facts: Any) -> None:
    """Write a part of one file."""
    write_record(store, part, write_file(store, path, data), **facts)


def read_record(store: Store, part: str) -> Record:
    """The record of a finished part. Raises FileNotFoundError if there is none, DamagedFileError if it has changed."""
    digest, _, content = store.read(record_path(part)).partition(b"\n")
    if hashlib.sha256(content).hexdigest().encode() != digest:
        raise DamagedFileError(f"{store.url(record_path(part))} differs from what was written")
    try:
        return Record.model_validate_json(content)
    except ValidationError as error:
        raise DamagedFileError(f"{store.url(record_path(part))} is no record of this version") from error


def read_records(store: Store, parts: Iterable[str]) -> list[Record]:
    """The records of several parts, in their order. Raises as `read_record`."""
    return in_parallel(partial(read_record, store), parts)


def look_at(store: Store, part: str, *, recipe: str = "") -> Look:
    """Read a part that has a record, all of its files, and compare. Raises StoreError if storage can't be reached."""
    try:
        record = read_record(store, part)
    except DamagedFileError as error:
        return Look(damage=str(error))
    if record.recipe != recipe:
        return Look()
    damage = verify_files(store, record.files)
    return Look(damage=damage[0]) if damage else Look(record=record)


def recorded_parts(store: Store) -> set[str]:
    """Names of the parts that have a record, whole or not."""
    return {info.path.removeprefix(f"{RECORDS}/").removesuffix(".json") for info in store.list(RECORDS)}


def record_path(part: str) -> str:
    return f"{RECORDS}/{part}.json"
