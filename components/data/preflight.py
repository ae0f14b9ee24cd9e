"""What a source is, whether it can be used, and what it holds, told cheaply before anything starts."""

import hashlib
import json
from difflib import get_close_matches
from typing import NamedTuple

from components.data.errors import SourceError
from components.data.ingest import PACKAGED, SOURCES
from components.data.listing import list_versions
from components.data.shards import INDEX, load_index
from components.data.sources import openmoji, scenes
from components.data.sources.fashion_mnist import IMAGES, idx_urls, installed_folder
from components.data.sources.folder import list_folder
from components.data.sources.webdataset import GLOB, TARS, list_tars
from components.storage.store import absolute


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
    if GLOB & set(path) or path.endswith(TARS):
        return SourceName("webdataset", path)
    try:
        names = [version.path for version in list_versions(path)]
    except SourceError as error:
        for near in get_close_matches(uri, (*PACKAGED, "fashion_mnist"), n=1):
            raise SourceError(f"no source {uri!r}, did you mean {near}? ({error})") from error
        raise
    if INDEX in names:
        return SourceName("shards", path)
    if any(name in (IMAGES, f"{IMAGES}.gz") for name in names):
        return SourceName("fashion_mnist", path)
    return SourceName("webdataset" if any(name.endswith(TARS) for name in names) else "folder", path)


def check_source(source: str, path: str | None) -> None:
    """Raise SourceError, in one line, for a source that can't be used: by listings only, no picture is read."""
    if source not in SOURCES:
        raise SourceError(f"no source {source!r}; there are {', '.join(SOURCES)}")
    if source == "openmoji":
        openmoji.package_versions()
    if source in PACKAGED:
        return
    if path is None and source == "fashion_mnist":
        path = installed_folder()
    if path is None:
        raise SourceError(f"source {source} needs a path: cascade data {source} PATH --out URI")
    path = absolute(path)
    match source:
        case "webdataset":
            list_tars(path)
        case "shards":
            load_index(path)
        case "fashion_mnist":
            idx_urls(path)
        case "folder":
            list_folder(path)


def source_digest(source: str, path: str | None) -> str:
    """A digest of what a source holds, never of where it lies: it enters the key of the first stage.

    Packaged sources: versions of packages and generator. A set with an index: the sha256 of its shards. Otherwise the
    listing: relative names, sizes, and entity tags or modification times. Raises SourceError.
    """
    check_source(source, path)
    return hashlib.sha256(json.dumps([source, _facts(source, path)], sort_keys=True).encode()).hexdigest()


def _facts(source: str, path: str | None) -> object:
    if source == "openmoji":
        return [openmoji.GENERATOR_VERSION, openmoji.package_versions()]
    if source == "scenes":
        return scenes.GENERATOR_VERSION
    location = absolute(path or installed_folder())
    if source == "shards":
        index = load_index(location)
        return [index.text.sha256, index.holdout_fraction, [entry.sha256 for entry in index.shards]]
    if source == "webdataset":
        return [(version.path.rpartition("/")[2], *version[1:]) for version in list_tars(location)]
    return list_versions(location)
