"""Checks of a source before any work: kind, usability, a digest of the contents."""

import fnmatch
import hashlib
import json
import logging
from collections.abc import Callable
from difflib import get_close_matches
from functools import cache, partial
from pathlib import PurePosixPath
from typing import NamedTuple

from components.data.ingest import INSTALLED, PACKAGED, SOURCES, needed_path
from components.data.listing import FileVersion, SourceError, first_file, list_versions
from components.data.shards import INDEX, load_index
from components.data.sources import packaged, photographs
from components.data.sources.folder import list_folder
from components.data.sources.parquet import SUFFIX, find_parquet, is_parquet
from components.data.sources.source import COMMON, Columns, refuse_columns
from components.data.sources.webdataset import TARS, list_tars, split_glob
from components.data.tars import is_image
from components.runtime.storage.artifact import Artifact
from components.runtime.storage.connection import StoreError, reason
from components.runtime.storage.model_table import column_of
from components.runtime.storage.store import Store, absolute, read_range

warn_once = cache(partial(logging.getLogger(__name__).warning, "%s"))


class SourceName(NamedTuple):
    """A source as `ingest` takes it."""

    source: str
    path: str | None


def detect_source(uri: str) -> SourceName:
    """The source behind `uri`: a packaged source by name, or the files at the URL.
    Raises SourceError for a URL without files, or without any that are understood."""
    if uri in PACKAGED:
        return SourceName(uri, None)
    if uri in INSTALLED:
        return SourceName(uri, INSTALLED[uri]())
    path = absolute(uri)
    if path.endswith(SUFFIX):
        return SourceName("parquet", path)
    if split_glob(path)[1] or path.endswith(TARS):
        return SourceName("webdataset", path)
    try:
        versions = list_versions(path)
    except SourceError as error:
        for near in get_close_matches(uri, (*PACKAGED, *INSTALLED), n=1):
            raise SourceError(f"no source {uri!r}, did you mean {near}? ({error})") from error
        raise
    names = {version.path for version in versions}
    if INDEX in names:
        return SourceName("shards", path)
    if names & {packaged.IMAGES, f"{packaged.IMAGES}.gz"}:
        return SourceName("fashion_mnist", path)
    if any(name.endswith(TARS) for name in names):
        return SourceName("webdataset", path)
    parquet = sum(version.bytes for version in versions if is_parquet(version.path))
    images = sum(version.bytes for version in versions if is_image(version.path))  # a table may lie next to images
    return SourceName("parquet" if parquet > images else "folder", path)


class Listed(NamedTuple):
    """The contents of a source that can be used."""

    facts: object  # all that tells the contents from others, never their place
    files: tuple[FileVersion, ...] = ()  # tars by absolute URLs, others by paths; none with an index
    notes: tuple[str, ...] = ()  # lines about files and columns that won't be read


def check_source(source: str, path: str | None, columns: Columns = COMMON) -> Listed:
    """Raise SourceError for a source that can't be used; lists files, reads no image.
    Warns of files and columns that won't be read, once in a process."""
    if source not in SOURCES:
        raise SourceError(f"no source {source!r}; there are {', '.join(SOURCES)}")
    if source in PACKAGED and path is not None:
        raise SourceError(f"{source} is drawn by this program and takes no path, not {path}")
    if source in INSTALLED and path is None:
        path = INSTALLED[source]()
    if source not in ("folder", "parquet"):
        refuse_columns(columns, path or source)
    listed = _listed(source, None if source in PACKAGED else absolute(needed_path(source, path)), columns)
    for note in listed.notes:
        warn_once(note)
    return listed


def _listed(source: str, path: str | None, columns: Columns) -> Listed:
    if path is None:
        return Listed(PACKAGED[source]())
    if source == "shards":
        index = load_index(path)
        digests = column_of(index.shards, "sha256").tolist()
        return Listed([index.text.sha256, index.holdout_fraction, digests])
    if source == "webdataset":
        tars = tuple(list_tars(path))
        return Listed([(tar.path.rpartition("/")[2], *tar[1:]) for tar in tars], tars)
    if source == "parquet":
        parquet = find_parquet(path, columns)
        return Listed(parquet.files, parquet.files, parquet.notes)
    if source == "photographs":
        found = photographs.find_photographs(path)
        return Listed([photographs.VERSION, found], found)
    versions = tuple(list_versions(path))
    if source == "fashion_mnist":
        packaged.idx_urls(path)
        return Listed(versions, versions)
    listing = list_folder(path, versions, columns)
    return Listed([versions, listing.reading] if listing.reading else versions, versions, listing.notes)


def source_digest(source: str, path: str | None, columns: Columns = COMMON) -> str:
    """A digest of a source's contents, never of its place, for the key of the first stage.
    Packaged sources: versions of packages and generator. A set with an index: the sha256 of its shards. Otherwise the
    listing: relative names, sizes, and entity tags or modification times, and how they are read. Raises SourceError."""
    facts = check_source(source, path, columns).facts
    return hashlib.sha256(json.dumps([source, facts], sort_keys=True).encode()).hexdigest()


def file_to_try(source: str, path: str | None) -> FileVersion | None:
    """A file that every reader of the source must be able to read, by its absolute URL."""
    location = absolute(path or INSTALLED[source]())
    if source == "shards":
        index = load_index(location)
        return next((FileVersion(index.url(entry.url), entry.bytes, "") for entry in index.shards), None)
    if source == "fashion_mnist":
        return first_file(packaged.idx_urls(location)[0])
    if source == "photographs":
        return first_file(Store(location).url(photographs.table()[0].file))
    folder, pattern = split_glob(location)
    kinds: dict[str, Callable[[str], bool]] = {"parquet": is_parquet, "webdataset": lambda name: name.endswith(TARS)}
    is_kind = kinds.get(source, is_image)
    return first_file(folder, lambda name: fnmatch.fnmatchcase(name, pattern or "*") and is_kind(name))


def shard_in_place(images: Artifact) -> FileVersion | None:
    """A shard in the user's own place, not written by the stage; None if there is none."""
    index = load_index(images.url(INDEX))
    shards = (index.shards[number] for number, url in enumerate(column_of(index.shards, "url")) if "/" in url)
    return next((FileVersion(index.url(shard.url), shard.bytes, "") for shard in shards), None)


def check_file(file: FileVersion) -> None:
    """Raise SourceError, in a line, if a file of the source can't be read here, or has another size here."""
    try:
        read_range(file.path, 0, 1)
        here = first_file(file.path)
    except (OSError, StoreError) as error:
        raise SourceError(
            f"the source's {file.path} can't be read ({reason(error)}); check the address and the rights"
        ) from error
    if here is not None and here.bytes != file.bytes:
        raise SourceError(
            f"{file.path} has {here.bytes} bytes here and {file.bytes} where it was listed: it was cut short, or is "
            "another file; copy it again"
        )


def check_outside(place: str, path: str, *, option: str = "--out") -> None:
    """Raise SourceError if files below `place`, the value of `option`, would be read with the source."""
    folder, pattern = split_glob(absolute(path))
    below = PurePosixPath(place.removeprefix(folder).lstrip("/"), "shard-0.tar").as_posix()
    if f"{place}/".startswith(f"{folder}/") and fnmatch.fnmatchcase(below, pattern or "*"):
        raise SourceError(
            f"{option} {place} lies in the source {path}: what is written there would be read as a part of it; name a "
            "folder beside it"
        )
