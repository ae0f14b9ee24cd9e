"""`cascade sample`: images and a labelled grid from a registered model or a cascade artifact."""

import re
import time
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from components.sampling.image_files import encode_png, open_header
from components.sampling.requests import typed_options
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

COUNT = 4  # images for each label or prompt, where nothing else is said


@takes_options(typed_options(), before="settings")
def sample(
    model: Model = None,
    label: Annotated[list[str], typer.Option(help="Class name or number. Repeatable.")] = [],  # noqa: B006
    prompt: Annotated[list[str], typer.Option(help="A text. Repeatable.")] = [],  # noqa: B006
    condition: Annotated[list[Path], typer.Option(help="Condition image, or 16-bit depth map. Repeatable.")] = [],  # noqa: B006
    generator: Annotated[str | None, typer.Option(help="diffusion, tokens, pixels, gan, vae; else the first.")] = None,
    seed: Seed = None,
    count: Annotated[int | None, typer.Option(help="Images for each label or prompt.  [4, or 1]", min=1)] = None,
    settings: Sampling = [],  # noqa: B006
    like: Annotated[Path | None, typer.Option(help=LIKE)] = None,
    tracking: Tracking = None,
    out: Annotated[Path, typer.Option(help="Folder for the images and the grid.")] = Path("samples"),
    **options: Any,
) -> None:
    """Sample a trained model: images and a labelled grid.

    **Examples**

    - `cascade sample --model models:/image-cascade-openmoji@champion --label Flags --label "Animals & Nature"`
    - `cascade sample --model models:/image-cascade-scenes@champion --prompt "a large red cube" --count 8 --seed 7`
    - `cascade sample --model models:/image-cascade-dalle@champion --prompt car --best-of 8`
    - `cascade sample --model models:/image-cascade-vqgan_transformer@champion --label cube --size 128x64 --top-k 50`
    - `cascade sample --model models:/image-cascade-depth@champion --condition depth.png`
    - `cascade sample --model models:/image-cascade-ddpm@champion --sampler ddim --steps 25`
    - `cascade sample --model models:/image-cascade-openmoji@champion --label Flags --set upsampler_64.noise_level=20`
    - `cascade sample --model models:/image-cascade-classifier_guided@champion --label Flags --classifier-scale 2`
    - `cascade sample --model models:/image-cascade-gan@champion --label cube --truncation 0.5`
    - `cascade sample --like samples/a-large-red-cube-diffusion-0007.png` — the same image again
    - `cascade sample --like samples/a-large-red-cube-diffusion-0007.png --guidance-scale 5 --count 4` — others like it
    """
    share_cores()
    from components.evaluation.grids import labelled_grid
    from pipelines.command.loading import at_work, open_model

    check_out(out)
    started, console = time.monotonic(), Console()
    with at_work(console):
        opened = open_model(model, like=like, tracking=tracking, condition=condition)
        plain = opened.request({"generator": generator, "seed": seed, **options}, settings)
        asked = [plain.replace(label=each, prompt=None) for each in label]
        asked += [plain.replace(label=None, prompt=each) for each in prompt]
        asked = asked or [plain]
        if condition:
            seen = opened.cascade.condition_images
            given = [read_condition(path, seen) for path in condition]
            asked = [request.replace(condition=image) for request in asked for image in given]
        count = count or (COUNT if like is None else 1)
        requests = [request.replace(seed=request.seed + i) for request in asked for i in range(count)]
        images = opened.cascade.sample(requests)
    conditions = list(dict.fromkeys(request.condition for request in requests))
    bare = [f"condition {conditions.index(r.condition)}" if r.condition else "unconditional" for r in requests]
    asked_for = [each.prompt if each.label is None else str(each.label) for each in requests]
    names = [asked or other for asked, other in zip(asked_for, bare, strict=True)]
    slugs = [re.sub(r"[^a-z0-9]+", "-", name.lower())[:40] for name in names]
    files = [f"{slug}-{each.generator}-{each.seed:04d}" for slug, each in zip(slugs, requests, strict=True)]
    taken = Counter(files)  # equal names get a number
    for number, (image, file, request) in enumerate(zip(images, files, requests, strict=True)):
        name = f"{file}-{number}" if taken[file] > 1 else file
        write_new(out, name, opened.signed(encode_png(image), request))
    (out / "grid.png").write_bytes(labelled_grid(images, names))
    console.print(f"{len(images)} images in {time.monotonic() - started:.1f} s, in {out}", highlight=False)
    typer.echo(f"grid: {out / 'grid.png'}")


def read_condition(path: Path, seen: Any) -> bytes:
    """Reads a file as a condition image of the kind and size `seen`, see `Cascade.condition_images`.
    A depth map of 16 bits, or a map of classes, becomes an image as in training. Raises ValueError for a file that is
    no image, for a class that the model does not know, or for a model without condition images."""
    from PIL import Image

    from components.data.images import load_depth, load_image, load_mask

    if seen is None:
        raise ValueError("this model takes no condition image; leave --condition out")
    if not path.is_file():
        raise ValueError(f"--condition {path}: no such file")
    data = path.read_bytes()
    try:
        if seen.classes:
            return encode_png(load_mask(data, resolution=seen.resolution, mask_values=seen.classes))
        raw_depth = seen.member == "depth" and open_header(data).mode.startswith(("I", "F"))
        return encode_png((load_depth if raw_depth else load_image)(data, resolution=seen.resolution))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"--condition {path} can't be read as an image ({error})") from error
