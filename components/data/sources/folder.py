"""A folder of pictures: class sub-folders, or `captions.jsonl` / `captions.csv` at its top."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from components.data.errors import SourceError
from components.data.listing import FileVersion, list_versions
from components.data.pictures import decode_picture, fit_square
from components.data.sources.source import Drawing, Item, Source, safe_keys
from components.storage.store import Store, read_url

LICENSE = "unspecified"
PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
NO_CLASS = "picture"
FORMS = (
    "give it class sub-folders (PATH/cat/1.png), or captions.jsonl / captions.csv at its top with the columns "
    "file, caption and, if you like, class"
)


@dataclass(frozen=True)
class FolderReader:
    """Reads one picture file by its absolute URL."""

    path: str

    def read(self, item: Item) -> bytes:
        return read_url(Store(self.path).url(item.location))

    def draw(self, item: Item, data: bytes, *, resolution: int) -> Drawing:
        return Drawing(fit_square(decode_picture(data), resolution), details={"file": item.location})


def list_folder(path: str, versions: Sequence[FileVersion] | None = None) -> Source:
    """The pictures below `path` with their classes and captions.

    Args:
        versions: what `list_versions` found there, where that is known already.

    Raises SourceError if there is nothing, no picture, no class, or a captions file that does not fit.
    """
    names = [version.path for version in (list_versions(path) if versions is None else versions)]
    pictures = [name for name in names if PurePosixPath(name).suffix.lower() in PICTURES]
    if not pictures:
        raise SourceError(f"no pictures below {path}; {FORMS}")
    for captions in ("captions.jsonl", "captions.csv"):
        if captions in names:
            return _captioned(path, captions, set(pictures))
    return _sub_folders(path, pictures)


def _sub_folders(path: str, pictures: Sequence[str]) -> Source:
    pictures = [name for name in pictures if "/" in name]
    classes = tuple(sorted({name.split("/")[0] for name in pictures}))
    if not classes:
        raise SourceError(f"no classes in {path}: all pictures lie at its top; {FORMS}")
    items = [
        Item(key, classes.index(name.split("/")[0]), name.split("/")[0].replace("_", " "), name)
        for key, name in zip(safe_keys(pictures), pictures, strict=True)
    ]
    return Source("folder", LICENSE, classes, tuple(items), FolderReader(path))


def _captioned(path: str, captions: str, pictures: set[str]) -> Source:
    place = Store(path).url(captions)
    rows = _parse(captions, read_url(place).decode("utf-8-sig"), place)
    named = [row["file"] for row in rows]
    missing = next((name for name in named if name not in pictures), None)
    if missing is not None or not rows:
        raise SourceError(f"{place} names {missing or 'no picture'}, which is not below {path}; correct the file")
    repeated = next((name for name in named if named.count(name) > 1), None) if len(set(named)) < len(named) else None
    if repeated is not None:
        raise SourceError(f"{place} names {repeated} twice; keep one line for each picture")
    classes = tuple(sorted({row["class"] for row in rows}))
    items = [
        Item(key, classes.index(row["class"]), row["caption"], row["file"])
        for key, row in zip(safe_keys(named), rows, strict=True)
    ]
    return Source("folder", LICENSE, classes, tuple(items), FolderReader(path))


def _parse(name: str, content: str, place: str) -> list[dict[str, str]]:
    """Rows of `file`, `caption`, `class`; `file_name` and `text` are understood too."""
    try:
        if name.endswith(".csv"):
            raw = list(csv.DictReader(io.StringIO(content)))
        else:
            raw = [json.loads(line) for line in content.splitlines() if line.strip()]
        return [
            {
                "file": str(row.get("file") or row["file_name"]),
                "caption": str(row["caption"] if "caption" in row else row["text"]),
                "class": str(row.get("class") or NO_CLASS),
            }
            for row in raw
        ]
    except (KeyError, ValueError, AttributeError, csv.Error) as error:
        raise SourceError(f"{place} can't be read ({error}); each line needs a file and a caption") from error
