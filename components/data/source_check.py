"""What a source is, whether it can be used, and what it holds, told cheaply before anything starts."""

import fnmatch
import hashlib
import json
import logging
from collections.abc import Callable
from difflib import get_close_matches
from functools import lru_cache
from pathlib import PurePosixPath
from typing import NamedTuple

from components.data.errors import SourceError
from components.data.ingest import PACKAGED, SOURCES
from components.data.listing import FileVersion, first_file, list_versions
from components.data.shards import INDEX, load_index
from components.data.sources import openmoji, scenes
from components.data.sources.columns import COMMON, Columns
from components.data.sources.fashion_mnist import IMAGES, idx_urls, installed_folder
from components.data.sources.folder import IMAGE_SUFFIXES, list_folder
from components.data.sources.parquet import SUFFIX, find_parquet, is_parquet
from components.data.sources.webdataset import GLOB, TARS, list_tars, split_glob
from components.runtime.storage.connection import StoreError, reason
from components.runtime.storage.store import absolute, read_range

logger = logging.getLogger(__name__)


class SourceName(NamedTuple):
    source: str
    path: str | None


def detect_source(uri: str) -> SourceName:
    """The source that `uri` stands for: the name of a packaged one, or what lies at the URL.

    Raises SourceError if there is nothing, or nothing that is understood.
    """
    if uri in PACKAGED:
        return SourceName(uri, None)
    if uri == "fashion_mnist":
        return SourceName(uri, installed_folder())
    path = absolute(uri)
    if path.endswith(SUFFIX):
        return SourceName("parquet", path)
    if GLOB & set(path) or path.endswith(TARS):
        return SourceName("webdataset", path)
    try:
        versions = list_versions(path)
    except SourceError as error:
        for near in get_close_matches(uri, (*PACKAGED, "fashion_mnist"), n=1):
            raise SourceError(f"no source {uri!r}, did you mean {near}? ({error})") from error
        raise
    names = [version.path for version in versions]
    if INDEX in names:
        return SourceName("shards", path)
    if any(name in (IMAGES, f"{IMAGES}.gz") for name in names):
        return SourceName("fashion_mnist", path)
    if any(name.endswith(TARS) for name in names):
        return SourceName("webdataset", path)
    parquet = sum(version.bytes for version in versions if is_parquet(version.path))
    images = sum(version.bytes for version in versions if _is_image(version.path))  # a table may lie next to images
    return SourceName("parquet" if parquet > images else "folder", path)


class Looked(NamedTuple):
    """What was listed: tars by absolute URLs, other files by their paths; nothing of a source without files or with an
    index."""

    listed: list[FileVersion]
    reading: tuple[str, ...] = ()  # of `Source`, as the notes
    notes: tuple[str, ...] = ()


def check_source(source: str, path: str | None, columns: Columns = COMMON) -> Looked:
    """Raise SourceError, in one line, for a source that can't be used: by a listing only, no image is read. What of it
    won't be read is warned of, once in a process.
    """
    if source not in SOURCES:
        raise SourceError(f"no source {source!r}; there are {', '.join(SOURCES)}")
    if source == "openmoji":
        openmoji.package_versions()
    if source in PACKAGED:
        return Looked([])
    if path is None and source == "fashion_mnist":
        path = installed_folder()
    if path is None:
        raise SourceError(f"source {source} needs a path: cascade data {source} PATH --out URI")
    looked = _look(source, absolute(path), columns)
    for note in looked.notes:
        _warn_once(note)
    return looked


def _look(source: str, path: str, columns: Columns) -> Looked:
    if source == "shards":
        load_index(path)
        return Looked([])
    if source == "webdataset":
        return Looked(list_tars(path))
    if source == "parquet":
        found = find_parquet(path, columns)
        return Looked(list(found.files), notes=found.notes)
    versions = list_versions(path)
    if source == "fashion_mnist":
        idx_urls(path)
        return Looked(versions)
    listing = list_folder(path, versions, columns)
    return Looked(versions, listing.reading, listing.notes)


@lru_cache
def _warn_once(note: str) -> None:
    logger.warning("%s", note)


def file_to_try(source: str, path: str | None) -> FileVersion | None:
    """A file that whoever reads the source must be able to read, by its absolute URL."""
    location = absolute(path or installed_folder())
    if source == "shards":
        index = load_index(location)
        return next((FileVersion(index.url(entry.url), entry.bytes, "") for entry in index.shards), None)
    if source == "fashion_mnist":
        return first_file(idx_urls(location)[0], lambda path: True)
    folder, pattern = split_glob(location)
    if source == "parquet":
        return first_file(folder, _is_like(pattern, is_parquet))
    return first_file(folder, _is_like(pattern, _is_tar) if source == "webdataset" else _is_image)


def check_file(file: FileVersion) -> None:
    """Raise SourceError, in one line, if a file of the source can't be read here, or is another one here."""
    try:
        read_range(file.path, 0, 1)
        found = first_file(file.path, lambda path: True)
    except (OSError, StoreError) as error:
        raise SourceError(
            f"the source's {file.path} can't be read ({reason(error)}); check the address and the rights"
        ) from error
    if found is not None and found.bytes != file.bytes:
        raise SourceError(
            f"{file.path} has {found.bytes} bytes here and {file.bytes} where it was listed: it was cut short, or is "
            "another file; copy it again"
        )


def check_outside(out: str, path: str) -> None:
    """Raise SourceError if a tar that is written to `out` would be one of the tars at `path`."""
    folder, pattern = split_glob(absolute(path))
    below = PurePosixPath(out.removeprefix(folder).lstrip("/"), "shard-0.tar").as_posix()
    if f"{out}/".startswith(f"{folder}/") and _is_like(pattern, _is_tar)(below):
        raise SourceError(
            f"--out {out} lies in the source {path}: what is written there would be read as a part of it; name a "
            "folder beside it"
        )


def _is_like(pattern: str | None, is_kind: Callable[[str], bool]) -> Callable[[str], bool]:
    return lambda path: fnmatch.fnmatchcase(path, pattern or "*") and is_kind(path)


def _is_tar(path: str) -> bool:
    return path.endswith(TARS)


def _is_image(path: str) -> bool:
    return PurePosixPath(path).suffix.lower() in IMAGE_SUFFIXES


def source_digest(source: str, path: str | None, columns: Columns = COMMON) -> str:
    """A digest of what a source holds, never of where it lies: it enters the key of the first stage.

    Packaged sources: versions of packages and generator. A set with an index: the sha256 of its shards. Otherwise the
    listing: relative names, sizes, and entity tags or modification times, and how they are read where that is not the
    only way. Raises SourceError.
    """
    facts = _facts(source, path, check_source(source, path, columns))
    return hashlib.sha256(json.dumps([source, facts], sort_keys=True).encode()).hexdigest()


def _facts(source: str, path: str | None, looked: Looked) -> object:
    if source == "openmoji":
        return [openmoji.GENERATOR_VERSION, openmoji.package_versions()]
    if source == "scenes":
        return scenes.GENERATOR_VERSION
    if source == "shards":
        index = load_index(absolute(str(path)))
        return [index.text.sha256, index.holdout_fraction, [entry.sha256 for entry in index.shards]]
    if source == "webdataset":
        return [(version.path.rpartition("/")[2], *version[1:]) for version in looked.listed]
    return [looked.listed, looked.reading] if looked.reading else looked.listed
