"""`cascade translate`: from an image to an image, by an image-to-image model or a filled mask."""

import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from components.models.diffusion.steps import SAMPLERS
from components.sampling.image_files import encode_png, open_given_image, to_mask, to_rgb
from components.sampling.requests import in_words, request_options, typed_options
from pipelines.command.options import (
    LIKE,
    Model,
    Sampling,
    Seed,
    Tracking,
    check_out,
    share_cores,
    takes_options,
    write_new,
)

WORK_ON_IMAGES = ("translate", "diffusion")  # the latter fills masks
OPTIONS = {name: option for name, option in typed_options().items() if "translate" in option.generators}
HIDDEN = 127  # gray level of what the mask hides


@takes_options({"task": request_options()["task"]}, before="prompt")
@takes_options(OPTIONS, before="settings", steps="Denoising steps.", sampler=f"One of {in_words([*SAMPLERS])}.")
def translate(
    image: Annotated[Path, typer.Option(help="The image to work on, of the model's size.")],
    model: Model = None,
    mask: Annotated[Path | None, typer.Option(help="White where pixels are to be made; of the image's size.")] = None,
    prompt: Annotated[str | None, typer.Option(help="What is to be seen, where the model takes a text.")] = None,
    label: Annotated[str | None, typer.Option(help="Class name or number, where the model takes one.")] = None,
    seed: Seed = None,
    count: Annotated[int, typer.Option(help="Images to make of it.", min=1)] = 1,
    settings: Sampling = [],  # noqa: B006
    like: Annotated[Path | None, typer.Option(help=LIKE)] = None,
    tracking: Tracking = None,
    out: Annotated[Path, typer.Option(help="Folder for the images.")] = Path("translated"),
    **options: Any,
) -> None:
    """Work on an image: fill masks, extend it, color it, restore it, enlarge it.

    Pixels that the mask leaves black stay exactly as they are. A diffusion model of images fills masks without having
    been trained for it: known pixels are put back at each step.

    **Examples**

    - `cascade translate --model models:/palette@champion --image photo.png --mask mask.png --task inpainting`
    - `cascade translate --model models:/palette@champion --image gray.png --task colorization --count 4`
    - `cascade translate --model models:/image-cascade-openmoji@champion --image made.png --mask mask.png --label Flags`
    - `cascade translate --model models:/glide@champion --image photo.png --mask mask.png --prompt "red heart"`
    - `cascade translate --like translated/photo-inpainting-0000.png --image photo.png --mask mask.png --seed 1`
    """
    share_cores()
    import numpy as np

    from components.evaluation.grids import GridBlock, render_blocks
    from pipelines.command.loading import at_work, open_model

    check_out(out)
    started, console = time.monotonic(), Console()
    with at_work(console):
        masked = None if mask is None else image_bytes("--mask", mask)
        given = {"image": image_bytes("--image", image), "mask": masked}
        opened = open_model(model, like=like, tracking=tracking, **given)
        there = opened.cascade.generators
        generator = next((name for name in WORK_ON_IMAGES if name in there), None)
        if generator is None:
            raise ValueError(f"{opened.address} does not work on images: it has {' and '.join(there)}")
        changes = {"label": label, "prompt": prompt, "generator": generator, "seed": seed, **options, **given}
        asked = opened.request(changes, settings)
        requests = [asked.replace(seed=asked.seed + number) for number in range(count)]
        images = opened.cascade.sample(requests)
    for made, request in zip(images, requests, strict=True):
        name = f"{image.stem}-{request.task or 'translated'}-{request.seed:04d}"
        write_new(out, name, opened.signed(encode_png(made), request))
    before = np.array(open_given_image(asked.image or b"", to_rgb))
    if asked.mask is not None:
        before[np.array(open_given_image(asked.mask, to_mask)) >= 128] = HIDDEN
    blocks = [GridBlock("before", [before]), GridBlock("after", images)]
    (shown := out / "before_after.png").write_bytes(render_blocks(blocks, columns=min(4, len(images))))
    console.print(f"{count} images in {time.monotonic() - started:.1f} s, in {out}", highlight=False)
    typer.echo(f"before and after: {shown}")


def image_bytes(option: str, path: Path) -> bytes:
    """Reads an image file. Raises ValueError, naming option and file, for a file that is no image."""
    if not path.is_file():
        raise ValueError(f"{option} {path}: no such file")
    data = path.read_bytes()
    try:
        open_given_image(data, to_rgb)
    except ValueError as error:
        raise ValueError(f"{option} {path}: {error}") from error
    return data
