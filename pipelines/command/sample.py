"""`cascade sample` and `cascade translate`: images of a model, from noise or from an image."""

import re
import time
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from components.models.diffusion.steps import SAMPLERS
from components.sampling.image_files import encode_png, open_given_image, open_header, to_mask, to_rgb
from components.sampling.requests import in_words, request_options, typed_options
from pipelines.command.options import LIKE, Model, Sampling, Seed, Tracking, share_cores, takes_options, write_new

COUNT = 4  # images for each label or prompt, where nothing else is said
WORK_ON_IMAGES = ("translate", "diffusion")  # the latter fills masks
OF_TRANSLATE = {name: option for name, option in typed_options().items() if "translate" in option.generators}
HIDDEN = 127  # gray level of what the mask hides


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

    started, console = time.monotonic(), Console()
    with at_work(out, console):
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


@takes_options({"task": request_options()["task"]}, before="prompt")
@takes_options(OF_TRANSLATE, before="settings", steps="Denoising steps.", sampler=f"One of {in_words([*SAMPLERS])}.")
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

    started, console = time.monotonic(), Console()
    with at_work(out, console):
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
