"""`cascade translate`: from an image to an image, by an image-to-image model or a filled mask.

Masks are filled by any diffusion model of images.
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress

from components.configuration.usage import UsageError
from components.evaluation.grids import GridBlock, render_blocks
from components.sampling.image_files import open_given_image
from components.sampling.requests import Request
from pipelines.command.like import asked_like, named_model, read_like
from pipelines.command.sample import ModelSource, load_cascade, read_settings, source_of

WORK_ON_IMAGES = ("translate", "diffusion")  # generators; the latter fills masks, whatever it was trained for
HIDDEN = 127  # gray level of what the mask hides, in the image that shows before and after


def translate_image(
    model: str | None,
    *,
    image: Path,
    mask: Path | None,
    label: str | None,
    prompt: str | None,
    seed: int | None,
    count: int,
    options: Mapping[str, Any],
    tracking: str | None,
    out: Path,
    console: Console,
    settings: Sequence[str] = (),
    like: Path | None = None,
) -> Path:
    """Make `count` images from `image`; returns the path of the image of before and after.

    Args:
        options: fields of the request by name.
        like: a PNG of an image to make again; what is None or empty is as it was for that one.

    Raises UsageError for a model that is not there or does not work on images, and for files that it can't use.
    """
    started = time.monotonic()
    try:
        with Progress(console=console, transient=True) as bar:
            bar.add_task("loading and sampling", total=None)
            images_given = {
                "image": image_bytes("--image", image),
                "mask": None if mask is None else image_bytes("--mask", mask),
            }
            known = read_like(like)
            known.check_given(**images_given)
            source = source_of(named_model(model, known), tracking)
            cascade = load_cascade(source.address, tracking)
            generator = next((name for name in WORK_ON_IMAGES if name in cascade.generators), None)
            if generator is None:
                raise ValueError(f"{source.address} does not work on images: it has {' and '.join(cascade.generators)}")
            changes = {
                "label": label,
                "prompt": prompt,
                "generator": generator,
                "seed": seed,
                **options,
                **images_given,
            }
            asked = asked_like(known, cascade, changes, sampling=read_settings(settings))
            requests = [asked.replace(seed=asked.seed + number) for number in range(count)]
            images = cascade.sample(requests)
    except ValueError as error:
        raise UsageError(str(error)) from error
    shown = _write(images, requests, source, image, out)
    console.print(f"{count} images in {time.monotonic() - started:.1f} s, in {out}", highlight=False)
    return shown


def image_bytes(option: str, path: Path) -> bytes:
    """Reads an image file.

    Raises ValueError, naming option and file, for a file that is no image.
    """
    if not path.is_file():
        raise ValueError(f"{option} {path}: no such file")
    data = path.read_bytes()
    try:
        open_given_image(data)
    except ValueError as error:
        raise ValueError(f"{option} {path}: {error}") from error
    return data


def _write(images: list[np.ndarray], requests: list[Request], source: ModelSource, image: Path, out: Path) -> Path:
    out.mkdir(parents=True, exist_ok=True)
    for made, request in zip(images, requests, strict=True):
        name = f"{image.stem}-{request.task or 'translated'}-{request.seed:04d}.png"
        (out / name).write_bytes(source.png(made, request))
    asked = requests[0]
    before = np.array(open_given_image(asked.image or b""))
    if asked.mask is not None:
        before[np.array(open_given_image(asked.mask, mode="L")) >= 128] = HIDDEN
    shown = out / "before_after.png"
    blocks = [GridBlock("before", [before]), GridBlock("after", images)]
    shown.write_bytes(render_blocks(blocks, columns=min(4, len(images))))
    return shown
