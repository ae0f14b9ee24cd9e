"""A folder of images: class sub-folders, or `captions.jsonl` / `captions.csv` at its top."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from components.data.errors import SourceError
from components.data.images import decode_image, fit_square
from components.data.listing import FileVersion, list_versions
from components.data.sources.source import Drawing, Item, Source, safe_keys
from components.storage.store import Store, read_url

LICENSE = "unspecified"
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
NO_CLASS = "image"
FORMS = (
    "give it class sub-folders (PATH/cat/1.png), or captions.jsonl / captions.csv at its top with the columns "
    "file, caption and, if you like, class"
)


@dataclass(frozen=True)
class FolderReader:
    """Reads one image file by its absolute URL."""

    path: str

    def read(self, item: Item) -> bytes:
        return read_url(Store(self.path).url(item.location))

    def draw(self, item: Item, data: bytes, *, resolution: int) -> Drawing:
        return Drawing(fit_square(decode_image(data), resolution), details={"file": item.location})


def list_folder(path: str, versions: Sequence[FileVersion] | None = None) -> Source:
    """The images below `path` with their classes and captions.

    Args:
        versions: what `list_versions` found there, where that is known already.

    Raises SourceError if there is nothing, no image, no class, or a captions file that does not fit.
    """
    names = [version.path for version in (list_versions(path) if versions is None else versions)]
    images = [name for name in names if PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES]
    if not images:
        raise SourceError(f"no images below {path}; {FORMS}")
    for captions in ("captions.jsonl", "captions.csv"):
        if captions in names:
            return _captioned(path, captions, set(images))
    return _sub_folders(path, images)


def _sub_folders(path: str, images: Sequence[str]) -> Source:
    images = [name for name in images if "/" in name]
    classes = tuple(sorted({name.split("/")[0] for name in images}))
    if not classes:
        raise SourceError(f"no classes in {path}: all images lie at its top; {FORMS}")
    items = [
        Item(key, classes.index(name.split("/")[0]), name.split("/")[0].replace("_", " "), name)
        for key, name in zip(safe_keys(images), images, strict=True)
    ]
    return Source("folder", LICENSE, classes, tuple(items), FolderReader(path))


def _captioned(path: str, captions: str, images: set[str]) -> Source:
    place = Store(path).url(captions)
    rows = _parse(captions, read_url(place).decode("utf-8-sig"), place)
    named = [row["file"] for row in rows]
    missing = next((name for name in named if name not in images), None)
    if missing is not None or not rows:
        raise SourceError(f"{place} names {missing or 'no image'}, which is not below {path}; correct the file")
    repeated = next((name for name in named if named.count(name) > 1), None) if len(set(named)) < len(named) else None
    if repeated is not None:
        raise SourceError(f"{place} names {repeated} twice; keep one line for each image")
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
