"""Artifacts: typed, self-describing outputs of stages, committed by a write-once manifest.

Layout of a stage's folder `{root}/stages/{stage}/{key}`:
    attempt-…/      files of one try
    files/          outputs with fixed names that several tries may fill together (one input shard, one output file)
    train/          Ray Train's run folder, the one mutable place
    files-…/        the same of a forced try; so is train-…/
    manifest.json   written last; its presence is the commit

A try goes on where the try before was killed, but a forced try begins anew, in folders of its own (`files-ID`,
`work-ID`, `train-ID`). The file `forced` names them before the manifest moves aside, so that no later try works in the
folders of before. Files of older manifests stay for their readers until `cascade gc`.

A part of a stage's work has files under fixed names, and a record that is written last: size and sha256 of the files
when they were made, and facts from their maker. A later try adopts a part whose files still agree with its record, and
makes any other anew. A manifest takes entries from the record, never from the files: no damage is taken for the truth.
"""

import hashlib
import json
import re
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, TypeAdapter, ValidationError

from components.configuration.config import Config, first_fault
from components.configuration.file_names import FileName, FolderName
from components.runtime.storage.connection import shown
from components.runtime.storage.model_table import AsTable, column_of, ending
from components.runtime.storage.scratch import scratch_folder
from components.runtime.storage.store import (
    SMALL_TRANSFERS,
    DamagedFileError,
    Digest,
    Store,
    StoreError,
    digest_of,
    in_parallel,
)

MANIFEST = "manifest.json"
FORCED = "forced"  # file with the id of the latest forced try
LOG = "log"  # folder of a stage's points and warnings
RECORDS = "parts"  # folder of the records, next to the files of the parts
NOT_LISTED = ("train", "work")  # folders whose files no manifest lists
ArtifactKind = Literal["shards", "tokens", "model", "samples", "report"]
REMEDY = "it is damaged or of another version: delete it and run again"
T = TypeVar("T")
DIFFERS = "as in its manifest; delete the stage's folder and run again"


class ArtifactError(Exception):
    """A difference between an artifact and the manifest; the message names file and remedy."""


class FileEntry(Config):
    """A file of an artifact, in the manifest."""

    path: FileName  # relative to the stage's folder
    bytes: int
    sha256: str

    @property
    def digest(self) -> Digest:
        return Digest(self.bytes, self.sha256)


class Artifact(Config):
    """A committed output of a stage. Readers accept only files in `files`."""

    kind: ArtifactKind
    stage: FolderName
    key: FolderName
    files: Annotated[Sequence[FileEntry], AsTable(FileEntry)]
    metadata: dict[str, Any] = Field(default_factory=dict)
    inputs: dict[str, str] = Field(default_factory=dict)  # name of the input -> key of the stage that made it
    provenance: dict[str, Any] = Field(default_factory=dict)  # config, git commit, time, seconds: recorded, not hashed
    root: str = Field(default="", exclude=True)  # URI of the stage's folder: a place, never part of the identity

    @property
    def store(self) -> Store:
        """The stage's folder."""
        return Store(self.root)

    @property
    def digest(self) -> str:
        """sha256 of the whole manifest, as JSON with sorted fields."""
        return manifest_digest(json.loads(self.model_dump_json()))

    @property
    def identity(self) -> str:
        """`stage/key`, equal wherever the artifact lies."""
        return f"{self.stage}/{self.key}"

    def names(self) -> list[str]:
        """File names for users, without the attempt's folder."""
        return [_public_name(path) for path in column_of(self.files, "path")]

    def entry(self, name: str) -> FileEntry:
        """The entry of a file by name. Raises ArtifactError if the manifest lists no such file."""
        for entry in ending(self.files, "path", name):
            if name in (entry.path, _public_name(entry.path)):
                return entry
        raise ArtifactError(f"{self.identity} lists no file {name}; it has {', '.join(self.names()[:8])}")

    def url(self, name: str) -> str:
        """Absolute URL of a listed file."""
        return self.store.url(self.entry(name).path)

    def read(self, name: str) -> bytes:
        """Bytes of a listed file, verified by size and sha256.
        Raises ArtifactError if they differ from the manifest, or the manifest lists no such file."""
        entry = self.entry(name)
        try:
            return self.store.read(entry.path, expected=entry.digest)
        except DamagedFileError as error:
            raise ArtifactError(f"{error} {DIFFERS}") from error

    @contextmanager
    def local_copy(self) -> Iterator[Path]:
        """A temporary folder with all listed files, verified. Raises ArtifactError."""
        with scratch_folder(self.stage) as folder:
            yield self.download(folder)

    def download(self, folder: Path) -> Path:
        """Copy all listed files into `folder`, verified, and return `folder`. Raises ArtifactError."""

        def fetch(entry: FileEntry) -> None:
            self.store.download(entry.path, folder, _public_name(entry.path), expected=entry.digest)

        try:
            in_parallel(fetch, self.files)
        except DamagedFileError as error:
            raise ArtifactError(f"{error} {DIFFERS}") from error
        return folder


def upload_attempt(store: Store, folder: Path) -> list[FileEntry]:
    """Upload all files of a local folder to a new `attempt-…` folder of a stage's store.
    Returns the files' entries, sorted by path."""
    attempt = f"attempt-{uuid.uuid4().hex[:12]}"

    def send(local: Path) -> FileEntry:
        path = f"{attempt}/{local.relative_to(folder).as_posix()}"
        store.upload(local, path)
        return describe(local, path)

    return in_parallel(send, sorted(path for path in folder.rglob("*") if path.is_file()))


def describe(data: bytes | Path, path: str) -> FileEntry:
    """Manifest entry of bytes or of a local file, to be stored as `path`."""
    return FileEntry(path=path, **digest_of(data)._asdict())


def commit_artifact(store: Store, artifact: Artifact) -> Artifact:
    """Write the manifest once, and return the committed artifact: the winner's for the loser of a race."""
    manifest = json.loads(artifact.model_dump_json())
    store.write_once(MANIFEST, json.dumps(manifest | {"digest": manifest_digest(manifest)}, indent=1).encode())
    committed = load_artifact(store)
    assert committed is not None
    return committed


def manifest_digest(manifest: dict[str, Any]) -> str:
    """sha256 of a manifest without its own digest, as JSON with sorted fields."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def load_artifact(store: Store) -> Artifact | None:
    """The artifact committed in a stage's folder, or None. Raises ArtifactError for a changed manifest."""
    if not store.exists(MANIFEST):
        return None
    url = store.url(MANIFEST)
    values = parse_stored(dict[str, Any], store.read(MANIFEST), url)
    digest = values.pop("digest", None)
    artifact = parse_stored(Artifact, json.dumps(values), url)
    if manifest_digest(values) != digest:
        raise ArtifactError(f"{shown(url)} is not as it was written: its digest differs; {REMEDY}")
    return artifact.model_copy(update={"root": store.uri})


def parse_stored(shape: type[T], data: bytes | str, url: str) -> T:
    """Parse JSON from `url` as a `shape`. Raises ArtifactError, which names the first wrong value."""
    try:
        return TypeAdapter(shape).validate_json(data)
    except ValidationError as error:
        raise ArtifactError(f"{shown(url)} can't be used: {first_fault(error)}; {REMEDY}") from error


def verify_files(
    store: Store, files: Iterable[FileEntry], *, on_file: Callable[[FileEntry], None] = lambda entry: None
) -> list[str]:
    """Read every file, and return a line for each that is missing or differs from its entry, in order.
    `on_file`: called after each file, from the reading threads. Raises StoreError if storage can't be reached."""

    def check(entry: FileEntry) -> str:
        try:
            store.check(entry.path, entry.digest)
        except FileNotFoundError:
            return f"{store.url(entry.path)} is missing"
        except DamagedFileError as error:
            return str(error)
        finally:
            on_file(entry)
        return ""

    return [line for line in in_parallel(check, files) if line]


def current_try(store: Store) -> str:
    """The id of the latest forced try; "" where no try was forced. Raises StoreError for a damaged id."""
    if not store.exists(FORCED):
        return ""
    content = store.read(FORCED).decode(errors="replace")
    if not re.fullmatch("[0-9a-f]{12}", content):
        raise StoreError(f"{store.url(FORCED)} is damaged, it names no try; run the stage again with --force")
    return content


def begin_forced_try(store: Store, forced: str) -> None:
    """Make room for the forced try `forced`, or go on with the try. Called under the stage's lease."""
    if not store.exists(FORCED) or store.read(FORCED) != forced.encode():
        store.delete_folder(LOG)
        store.write(FORCED, forced.encode())
    if store.exists(MANIFEST):
        store.write(f"superseded-{forced}.json", store.read(MANIFEST))
        store.delete(MANIFEST)
    for name in store.folders():
        kind, _, own = name.partition("-")
        if kind in NOT_LISTED and own != forced:
            store.delete_folder(name)


def has_committed(store: Store, forced: str) -> bool:
    """True if the stage is committed; with `forced`, if the very try `forced` committed."""
    if not forced:
        return store.exists(MANIFEST)
    artifact = load_artifact(store)
    return artifact is not None and artifact.provenance.get(FORCED) == forced


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
    return describe(data, path)


def write_record(store: Store, part: str, *files: FileEntry, recipe: str = "", **facts: Any) -> Record:
    """Finish a part after the files: write the record, with a sha256 of the record itself."""
    record = Record(recipe=recipe, files=files, facts=facts)
    content = record.model_dump_json().encode()
    store.write(record_path(part), hashlib.sha256(content).hexdigest().encode() + b"\n" + content)
    return record


def read_record(store: Store, part: str) -> Record:
    """The record of a finished part.
    Raises FileNotFoundError for a part without a record, DamagedFileError for a record that has changed."""
    digest, _, content = store.read(record_path(part)).partition(b"\n")
    if hashlib.sha256(content).hexdigest().encode() != digest:
        raise DamagedFileError(f"{store.url(record_path(part))} differs from what was written")
    try:
        return Record.model_validate_json(content)
    except ValidationError as error:
        raise DamagedFileError(f"{store.url(record_path(part))} is no record of this version") from error


def read_records(store: Store, parts: Iterable[str]) -> list[Record]:
    """The records of several parts, in order. Raises as `read_record`."""
    return in_parallel(partial(read_record, store), parts, most=SMALL_TRANSFERS)


def look_at(store: Store, part: str, *, recipe: str = "") -> Look:
    """Read all files of a recorded part and compare the files with the record.
    Raises FileNotFoundError for a part without a record, StoreError if storage can't be reached."""
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


def _public_name(path: str) -> str:
    head, _, tail = path.partition("/")
    return tail if tail and head.partition("-")[0] in ("attempt", "files") else path
