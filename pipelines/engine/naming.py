"""What a run and its models are called: the name of the recipe, or of the images where they are one's own."""

import hashlib
import re
import unicodedata

from components.configuration.usage import UsageError
from components.data.ingest import PACKAGED
from components.data.sources.parquet import SUFFIX
from components.data.sources.webdataset import GLOB, TARS, split_glob
from components.runtime.storage.store import absolute
from pipelines.recipes.catalog import DEMO, RECIPES
from pipelines.recipes.shapes import Recipe

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}")
COMMON = {  # folders that say nothing of what is in them, where one above them does
    *("data", "dataset", "datasets", "files", "image", "images", "shard", "shards", "tar", "tars", "train", "training"),
}


def cascade_name(recipe: Recipe, given: str | None) -> str:
    """`given`, or the recipe's own name, or, of a recipe of the package on other images than its own, that of these.

    The models are registered as `image-cascade-NAME`, so that one's own images never move the champion of others'; the
    name is no part of a stage's key. Two recipes on the same images stay apart: `class_guided_on_photos`, and
    `photos` for the demo's.

    Raises UsageError for a name that MLflow's registry or a folder can't have.
    """
    name = given if given is not None else _name_of(recipe)
    if not NAME.fullmatch(name):
        raise UsageError(f"name {name!r} can't be that of a model: letters, digits, - and _, at most 100; set --name")
    return name


def _name_of(recipe: Recipe) -> str:
    packaged = RECIPES.get(recipe.name)
    if packaged is None or recipe.images.source == packaged().images.source:
        return recipe.name
    images = source_name(recipe.images.source)
    if recipe.name != DEMO:
        return f"{recipe.name}_on_{images}"
    return f"{images}_images" if images in RECIPES else images  # a folder that has the name of a recipe


def source_name(source: str) -> str:
    """The last part of a source's address that says what the images are, in letters, digits and underscores.

    s3://bucket/imagenet/train/*.tar -> imagenet; ~/photos -> photos; cats.tar -> cats; ~/Müller -> Muller; ~/写真 ->
    images_9c3250.
    """
    parts = [part for part in absolute(source).rpartition("://")[2].split("/") if part and not GLOB & set(part)]
    named = [name for part in parts if (name := _plain(_without_suffix(part)))]
    telling = [part for part in named if part.lower() not in COMMON]
    return (telling or named or ["images"])[-1]


def data_identity(source: str) -> str:
    """The address of a set as one writes it once: what models of its name are trained on, whatever was added to it."""
    if source in (*PACKAGED, "fashion_mnist"):
        return source
    return split_glob(absolute(source))[0]


def _plain(part: str) -> str:
    """A name in ASCII: letters without their accents, and a digest in place of letters that have none."""
    composed = unicodedata.normalize("NFC", part)
    bases = ["".join(c for c in unicodedata.normalize("NFKD", letter) if c.isascii()) for letter in composed]
    lost = any(letter.isalnum() and not base for letter, base in zip(composed, bases, strict=True))
    plain = re.sub(r"\W+", "_", "".join(bases), flags=re.ASCII).strip("_")[:60]
    return f"{plain or 'images'}_{hashlib.sha256(composed.encode()).hexdigest()[:6]}" if lost else plain


def _without_suffix(part: str) -> str:
    return next((part.removesuffix(suffix) for suffix in (*TARS, SUFFIX) if part.endswith(suffix)), part)
