"""Fashion-MNIST (Xiao et al., 2017; MIT) or any ten-class set in its IDX files, plain or gzipped."""

import gzip
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from components.data.images import fit_square
from components.data.listing import SourceError, list_versions
from components.data.sources.source import Drawing, Item, Source
from components.runtime.storage.store import Store

LICENSE = "MIT"
PACKAGE, INSTALLED = "dataset-fashion-mnist", "/usr/share/datasets/fashion-mnist"  # Debian's package and its folder
IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)


@dataclass(frozen=True)
class IdxReader:
    """Draws image number `item.location` of an IDX file."""

    images_url: str

    def read(self, item: Item) -> bytes:
        return read_idx(self.images_url)[int(item.location)].tobytes()

    def draw(self, item: Item, data: bytes, *, resolution: int) -> Drawing:
        side = int(len(data) ** 0.5)
        image = Image.frombytes("L", (side, side), data).convert("RGB")
        return Drawing(fit_square(image, resolution), details={"number": int(item.location)})


def list_fashion_mnist(path: str | None = None) -> Source:
    """Lists the training images at `path`, or of Debian's package.

    Raises SourceError for files that are missing, no IDX, or do not belong together.
    """
    images_url, labels_url = idx_urls(path or installed_folder())
    labels, images = read_idx(labels_url), read_idx(images_url)
    if images.ndim != 3 or images.shape[1] != images.shape[2] or labels.shape != images.shape[:1]:
        raise SourceError(f"{images_url} {images.shape} and {labels_url} {labels.shape} do not belong together")
    if labels.max(initial=0) >= len(CLASSES):
        raise SourceError(f"{labels_url} holds label {labels.max()}, Fashion-MNIST has {len(CLASSES)} classes")
    items = [
        Item(f"train-{number:06d}", int(label), CLASSES[label].lower(), str(number))
        for number, label in enumerate(labels)
    ]
    return Source("fashion_mnist", LICENSE, CLASSES, tuple(items), IdxReader(images_url))


def installed_folder() -> str:
    """The folder of Debian's package. Raises SourceError if the package is not installed."""
    if not Path(INSTALLED).is_dir():
        raise SourceError(
            f"fashion_mnist is not here: install Debian's package {PACKAGE}, or name the folder of its IDX files"
        )
    return INSTALLED


def idx_urls(path: str) -> tuple[str, str]:
    """URLs of the images and labels. Raises SourceError if there are none."""
    names = {version.path for version in list_versions(path)}
    files = [next((n for n in (name, f"{name}.gz") if n in names), None) for name in (IMAGES, LABELS)]
    if None in files:
        raise SourceError(f"no {IMAGES}[.gz] and {LABELS}[.gz] in {path}; give the folder that holds the IDX files")
    return Store(path).url(str(files[0])), Store(path).url(str(files[1]))


@lru_cache(maxsize=2)
def read_idx(url: str) -> np.ndarray:
    """The uint8 array of an IDX file, read once in a process. Raises SourceError for any other file."""
    folder, _, name = url.rpartition("/")
    data = Store(folder).read(name)
    try:
        data = gzip.decompress(data) if url.endswith(".gz") else data
    except (OSError, EOFError) as error:
        raise SourceError(f"{url} can't be unpacked ({error}); fetch it again") from error
    rank = data[3] if len(data) > 4 and data[:3] == b"\0\0\x08" else 0
    shape = tuple(np.frombuffer(data, ">u4", count=rank, offset=4).tolist()) if len(data) >= 4 + 4 * rank else ()
    if not rank or len(data) != 4 + 4 * rank + int(np.prod(shape)):
        raise SourceError(f"{url} is not a whole IDX file of bytes; fetch it again")
    return np.frombuffer(data, np.uint8, offset=4 + 4 * rank).reshape(shape)
