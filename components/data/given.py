"""Images as users have them, each as it is: folders, archives of images, npz files.

A folder holds images at any depth, or archives of images, in the order of their names. An npz file holds an array of
images (its first of four axes). One image that can't be read is an error: leaving it out would change N.
Shapes: N images, H W their pixels.
"""

import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby, islice
from operator import attrgetter
from pathlib import PurePosixPath
from typing import NamedTuple

import numpy as np
from fsspec.spec import AbstractBufferedFile
from PIL import Image

from components.configuration.config import refuse
from components.data.listing import FileVersion, list_versions, reason_of
from components.data.tars import MAX_MEMBER_BYTES, is_image, iterate_shard
from components.runtime.storage.connection import at, shown
from components.runtime.storage.store import BLOCK, Store, absolute, read_range
from components.sampling.image_files import decode_image

NUMPY, ARCHIVES = ".npz", (".tar", ".tar.gz", ".tgz", ".zip")
BATCH = 32  # images in memory at a time
MOST = 512  # images of one part
UNREADABLE = (OSError, SyntaxError, ValueError, KeyError, Image.DecompressionBombError)


class GivenImages(NamedTuple):
    """Image files of a folder, or the images of one archive."""

    place: Store
    files: tuple[FileVersion, ...]
    num_images: int
    order: str = "names"  # of an archive's images: features that were kept in another order are not theirs

    def batches(self) -> Iterator[np.ndarray]:
        """Yields uint8 (n, H, W, 3) in order, at most BATCH of one size.
        Raises ValueError for an unreadable image."""
        for _, alike in groupby(self.images(), key=lambda image: image.shape):
            while held := list(islice(alike, BATCH)):
                yield np.stack(held)

    def images(self) -> Iterator[np.ndarray]:
        """Yields uint8 (H, W, 3). Raises ValueError, in one line, for an image that can't be read."""
        for file in self.files:
            for name, item in contents(self.place, file.path):
                try:
                    yield item if isinstance(item, np.ndarray) else np.asarray(decode_image(item))
                except UNREADABLE as error:
                    fault = f"{self.place.url(name)} can't be read ({reason_of(error)}); remove it, or mend it"
                    raise ValueError(fault) from None


def contents(folder: Store, path: str) -> Iterator[tuple[str, bytes | np.ndarray]]:
    """Yields (name, image) of a file: encoded images in the order of their names, or rows of an npz file.
    Raises ValueError for an archive that can't be read; ShardError for a tar."""
    if path.endswith(NUMPY):
        yield from ((path, row) for row in rows_of(folder.url(path)))
    elif path.endswith(".zip"):
        with open_archive(folder.url(path)) as archive:
            for member in sorted(archive.infolist(), key=attrgetter("filename")):
                # beside each image macOS packs a file of attributes (AppleDouble) with the same ending
                if is_image(member.filename) and not PurePosixPath(member.filename).name.startswith("._"):
                    large = member.file_size > MAX_MEMBER_BYTES
                    yield f"{path}/{member.filename}", b"" if large else archive.read(member)
    elif path.endswith(ARCHIVES):
        # a key with its point sorts as the file's name: 0-1.png before 0.png
        for group in sorted(iterate_shard(folder.read(path), folder.url(path)), key=lambda group: f"{group.key}."):
            if group.image is not None:
                yield f"{path}/{group.key}", group.image
    else:
        yield path, folder.read(path)


class RemoteFile(AbstractBufferedFile):
    """A file at a URL, to be read at any place; each read is tried again. Raises as `Store.read`."""

    def __init__(self, url: str) -> None:
        size = at(url, lambda filesystem, path: filesystem.size(path))
        super().__init__(None, url, block_size=BLOCK, size=size)

    def _fetch_range(self, start: int, end: int) -> bytes:
        return read_range(self.path, start, end)

    def seek(self, loc: int, whence: int = 0) -> int:
        try:
            return super().seek(loc, whence)
        except ValueError as error:  # before the start; zipfile expects a file's own error
            raise OSError(str(error)) from error


@contextmanager
def open_archive(url: str) -> Iterator[zipfile.ZipFile]:
    """Opens a zip or npz file. Raises ValueError, in one line, for a damaged or missing one."""
    try:
        with RemoteFile(url) as file, zipfile.ZipFile(file) as archive:
            yield archive
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, RuntimeError) as error:  # the last: encrypted
        fault = f"{shown(url)} can't be read as an archive ({shown(str(error))})"
        raise ValueError(f"{fault}; fetch or write it again") from None


def rows_of(url: str) -> Iterator[np.ndarray]:
    """Yields images (H, W, 3) of an npz's first array of four axes, without holding the array.
    Raises ValueError for other values than uint8, or a damaged file."""
    with open_archive(url) as archive:
        for name in (name for name in archive.namelist() if name.endswith(".npy")):
            with archive.open(name) as member:
                try:
                    first = np.lib.format.read_magic(member) == (1, 0)
                    read = np.lib.format.read_array_header_1_0 if first else np.lib.format.read_array_header_2_0
                    shape, by_columns, dtype = read(member)
                except ValueError as error:
                    raise ValueError(f"{url}: {name} is no array ({error}); fetch or write it again") from None
                if len(shape) != 4:
                    continue
                if by_columns or dtype != np.uint8 or shape[3] != 3:
                    raise ValueError(f"{url}: {name} is {dtype} {shape}; images are uint8 (N, H, W, 3)")
                size = int(np.prod(shape[1:]))
                for number in range(shape[0]):
                    if len(row := member.read(size)) < size:
                        raise ValueError(f"{url}: {name} ends at image {number} of {shape[0]}; fetch or write it again")
                    yield np.frombuffer(row, np.uint8).reshape(shape[1:])
                return


def given_images(uri: str, *, needed: bool = True) -> list[GivenImages]:
    """The images at a folder, archive or npz file, in parts.
    Raises SourceError or ValueError if there are none, unless they are not `needed`."""
    uri = absolute(uri)
    single = uri.endswith((NUMPY, *ARCHIVES))
    store, versions = Store(uri.rpartition("/")[0] if single else uri), list_versions(uri)
    files = [version for version in versions if is_image(version.path)]
    alone = not single and [version.path for version in files] == [uri.rpartition("/")[2]]
    refuse(alone, f"{shown(uri)} is a single image: give a folder of images, a tar, a zip or an npz")
    if files and not single:
        chunks = [tuple(files[start : start + MOST]) for start in range(0, len(files), MOST)]
        return [GivenImages(store, chunk, len(chunk)) for chunk in chunks]
    archives = [v for v in versions if v.path.endswith((NUMPY, *ARCHIVES) if single else ARCHIVES)]
    parts = [GivenImages(store, (file,), sum(1 for _ in contents(store, file.path))) for file in archives]
    parts = [part for part in parts if part.num_images]
    if needed and not parts:
        raise ValueError(f"{shown(uri)} holds no images: give a folder of images, a tar, a zip or an npz")
    return parts
