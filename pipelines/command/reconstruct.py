"""`cascade reconstruct`: reconstructions of images by a trained autoencoder, with codes as colors."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console

from components.configuration.usage import UsageError, usage_errors
from components.data.images import load_mask
from components.evaluation.grids import GridBlock, render_blocks
from components.evaluation.restoration import psnr
from components.models.bottleneck import GaussianBottleneck
from components.models.bundle import DESCRIPTION as MODEL
from components.models.devices import products
from components.sampling.answers import reconstructed
from components.sampling.cascade import DESCRIPTION as CASCADE
from components.sampling.cascade import read_description
from components.sampling.device import best_device
from components.sampling.image_files import encode_png, enlarged
from components.sampling.images import from_uint8, index_grids, read_image, to_uint8
from components.sampling.model import SamplingModel, load_model
from pipelines.command.loading import local_model
from pipelines.command.options import check_out
from pipelines.command.sample import image_bytes

PARTS = ("tokenizer", "autoencoder", "model")  # of a cascade, that may be an autoencoder


class Reconstruction(NamedTuple):
    """An autoencoder's input, codes as colors and reconstruction of an image; uint8."""

    seen: np.ndarray  # (S, S, 3)  the image at the size of the model
    codes: np.ndarray | None  # (h, w, 3) the index grid in colors; None for a Gaussian
    made: np.ndarray  # (S, S, 3)


def reconstruct_images(
    model: str, *, images: Sequence[Path], tracking: str | None, out: Path, console: Console
) -> Path:
    """Reconstruct each image; returns the path of the image that shows all side by side.
    Raises UsageError for a model that is not there or is no autoencoder, and for files that are no images."""
    check_out(out)
    with usage_errors():
        files = [image_bytes("--image", image) for image in images]
        with local_model(model, tracking) as folder:
            loaded = load_autoencoder(model, folder)
        found = [reconstruct_file(loaded, *each) for each in zip(images, files, strict=True)]
    alike = len({image.stem for image in images}) < len(images)  # then all get numbers, which no name has twice
    columns: dict[str, list[np.ndarray]] = {}
    out.mkdir(parents=True, exist_ok=True)
    for number, (image, each) in enumerate(zip(images, found, strict=True)):
        console.print(f"{image}: {figures(loaded, each)}", highlight=False, soft_wrap=True)
        name = f"{image.stem}-{number}" if alike else image.stem
        height, width = each.seen.shape[:2]
        codes = None if each.codes is None else enlarged(each.codes, height=height, width=width)
        for kind, pixels in (("input", each.seen), ("codes", codes), ("reconstruction", each.made)):
            if pixels is not None:
                (out / f"{name}-{kind}.png").write_bytes(encode_png(pixels))
                columns.setdefault(kind, []).append(pixels)
    blocks = [GridBlock(kind, pixels) for kind, pixels in columns.items()]
    (together := out / "side_by_side.png").write_bytes(render_blocks(blocks, columns=len(found)))
    return together


def load_autoencoder(model: str, folder: Path) -> SamplingModel:
    """Loads the autoencoder in a folder: a single model, or a part of a cascade.
    Raises UsageError, naming the model, where the folder has no autoencoder."""
    if not (folder / CASCADE).is_file():
        if (kind := kind_of(folder)) != "autoencoder":
            raise UsageError(f"{model} is no autoencoder but a {kind}; give a vae, vqvae, vqgan, dvae or fsq")
        found = load_model("autoencoder", folder, device=best_device())
        if not is_of_maps(found) and (channels := found.module.image_channels) not in (1, 3):
            raise UsageError(f"{model} reads maps of {channels} channels: an image has none")
        return found
    stages = read_description(folder)["stages"]
    for part in PARTS:
        if part in stages and kind_of(folder / stages[part]) == "autoencoder":
            return load_model(part, folder / stages[part], device=best_device())
    parts = ", ".join(name for name, place in stages.items() if place)
    raise UsageError(f"{model} has no autoencoder; it is composed of {parts}")


def kind_of(folder: Path) -> str:
    """The kind of the network in a folder."""
    path = folder / MODEL
    return json.loads(path.read_text())["kind"] if path.is_file() else "pretrained text encoder"


def reconstruct_file(model: SamplingModel, path: Path, data: bytes) -> Reconstruction:
    """Reconstructs an image file with an autoencoder; for one of maps, a gray image of class numbers.
    Raises ValueError for a file that is no image, or for a class that the model does not know."""
    side, classes, codes = model.settings["resolution"], model.module.image_channels, None
    try:
        maps = is_of_maps(model) and load_mask(data, resolution=side, mask_values=classes)
    except ValueError as error:
        raise ValueError(f"--image {path}: {str(error).partition(';')[0]}; it reads {classes} classes") from error
    image = read_image(data, resolution=side) if maps is False else from_uint8(maps)
    seen = to_uint8(image[None])
    with products("fp32"):
        if not isinstance(model.module.bottleneck, GaussianBottleneck):
            codes = to_uint8(index_grids(model.module, seen))[0]
        return Reconstruction(seen[0], codes, reconstructed(model, image))


def is_of_maps(model: SamplingModel) -> bool:
    """True for an autoencoder of maps of classes."""
    return model.module.reconstruction == "classes"


def figures(model: SamplingModel, found: Reconstruction) -> str:
    """Formats PSNR, or the share of right pixels, and bits: the grid's places times log2 of the codes."""
    everywhere = np.ones((1, *found.seen.shape[:2]), dtype=bool)
    right, decibels = np.mean(found.made == found.seen), psnr(found.made[None], found.seen[None], everywhere)
    kept = f"{right:.1%} of pixels keep their class" if is_of_maps(model) else f"{decibels:.1f} dB"
    if found.codes is None:
        return f"{kept}, no codes"
    (height, width), size = found.codes.shape[:2], model.module.codebook_size
    bits, values = height * width * math.log2(size), found.seen.size
    whole = values / 3 * math.log2(model.module.image_channels) if is_of_maps(model) else 8 * values
    return f"{kept}, {height} x {width} codes of {size}: {bits:,.0f} bits for {whole:,.0f}"
