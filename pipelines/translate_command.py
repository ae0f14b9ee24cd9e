"""`cascade translate`: a picture in, a picture out, by a trained image-to-image model."""

import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import Progress

from components.data.pictures import encode_png
from components.evaluation.grids import Block, render_blocks
from components.sampling.pictures import open_picture
from components.sampling.requests import Request
from pipelines.sample_command import load_cascade
from pipelines.workflow import UsageError

HIDDEN = 127  # gray level of what the mask hides, in the picture that shows before and after


def translate_picture(
    model: str,
    *,
    image: Path,
    mask: Path | None,
    task: str | None,
    label: str | None,
    prompt: str | None,
    seed: int,
    count: int,
    steps: int | None,
    sampler: str | None,
    guidance_scale: float | None,
    tracking: str | None,
    out: Path,
    console: Console,
) -> Path:
    """Make `count` pictures of the one in `image`; returns the path of the picture that shows before and after.

    Raises UsageError for a model that is not there or does not work on pictures, and for files that it can't use.
    """
    started = time.monotonic()
    try:
        with Progress(console=console, transient=True) as bar:
            bar.add_task("loading and sampling", total=None)
            given = {"image": _file("--image", image), "mask": None if mask is None else _file("--mask", mask)}
            cascade = load_cascade(model, tracking)
            if "translate" not in cascade.roads:
                raise ValueError(f"{model} does not work on pictures: it has {' and '.join(cascade.roads)}")
            asked = Request(label=label, prompt=prompt, task=task, road="translate", **given)
            asked = asked._replace(steps=steps, sampler=sampler, guidance_scale=guidance_scale)
            pictures = cascade.sample([asked._replace(seed=seed + number) for number in range(count)])
    except ValueError as error:
        raise UsageError(str(error)) from error
    shown = _write(pictures, asked, image, out, seed=seed)
    console.print(f"{count} pictures in {time.monotonic() - started:.1f} s, in {out}", highlight=False)
    return shown


def _file(option: str, path: Path) -> bytes:
    """The bytes of a picture file. Raises ValueError, naming option and file, if it is none."""
    if not path.is_file():
        raise ValueError(f"{option} {path}: no such file")
    data = path.read_bytes()
    try:
        open_picture(data)
    except ValueError as error:
        raise ValueError(f"{option} {path}: {error}") from error
    return data


def _write(pictures: list[np.ndarray], asked: Request, image: Path, out: Path, *, seed: int) -> Path:
    out.mkdir(parents=True, exist_ok=True)
    for number, picture in enumerate(pictures):
        (out / f"{image.stem}-{asked.task or 'translated'}-{seed + number:04d}.png").write_bytes(encode_png(picture))
    before = np.array(open_picture(asked.image or b""))
    if asked.mask is not None:
        before[np.array(open_picture(asked.mask, mode="L")) >= 128] = HIDDEN
    shown = out / "before_after.png"
    blocks = [Block("before", [before]), Block("after", pictures)]
    shown.write_bytes(render_blocks(blocks, columns=min(4, len(pictures))))
    return shown
