"""Commands on trained models: `sample`, `translate`, `reconstruct`, `ema`, `promote`, `serve`."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from components.models.diffusion.steps import SAMPLERS
from components.sampling.requests import in_words, request_options, typed_options
from pipelines.command.options import Sampling, Tracking, share_cores, takes_options

LIKE = "A PNG of these commands: made again as it was, but for the options given. Its model is the default."
Model = Annotated[str | None, typer.Option(help="models:/NAME@champion, or the folder or URL of a cascade artifact.")]
Seed = Annotated[int | None, typer.Option(help="Seed of the first image; the others count on.  [0]", min=0)]


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
    - `cascade sample --model models:/image-cascade-openmoji@champion --prompt "red heart" --count 8 --seed 7`
    - `cascade sample --model models:/image-cascade-openmoji@champion --generator tokens --prompt car --best-of 8`
    - `cascade sample --model models:/image-cascade-vqgan_transformer@champion --label Flags --size 64x128 --top-k 50`
    - `cascade sample --model models:/image-cascade-depth@champion --condition depth.png`
    - `cascade sample --model models:/image-cascade-ddpm@champion --sampler ddim --steps 25`
    - `cascade sample --model models:/image-cascade-openmoji@champion --prompt car --set upsampler_64.noise_level=20`
    - `cascade sample --model models:/image-cascade-classifier_guided@champion --label Flags --classifier-scale 2`
    - `cascade sample --model models:/image-cascade-gan@champion --label Flags --truncation 0.5`
    - `cascade sample --like samples/red-heart-diffusion-0007.png` — the same image again
    - `cascade sample --like samples/red-heart-diffusion-0007.png --guidance-scale 5 --count 4` — others like it
    """
    share_cores()
    from pipelines.command.sample import sample_images

    written = sample_images(
        model,
        labels=label,
        prompts=prompt,
        conditions=condition,
        seed=seed,
        count=count,
        options={"generator": generator, **options},
        settings=settings,
        like=like,
        tracking=tracking,
        out=out,
        console=Console(),
    )
    typer.echo(f"grid: {written}")


@takes_options({"task": request_options()["task"]}, before="prompt")
@takes_options(
    {name: option for name, option in typed_options().items() if "translate" in option.generators},
    before="settings",
    help_texts={"steps": "Denoising steps.", "sampler": f"One of {in_words([*SAMPLERS])}."},
)
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
    - `cascade translate --model models:/image-cascade-ddpm@champion --image 16.png --mask mask.png --task inpainting`
    - `cascade translate --model models:/glide@champion --image photo.png --mask mask.png --prompt "red heart"`
    - `cascade translate --like translated/photo-inpainting-0000.png --image photo.png --mask mask.png --seed 1`
    """
    share_cores()
    from pipelines.command.translate import translate_image

    written = translate_image(
        model,
        image=image,
        mask=mask,
        label=label,
        prompt=prompt,
        seed=seed,
        count=count,
        options=options,
        settings=settings,
        like=like,
        tracking=tracking,
        out=out,
        console=Console(),
    )
    typer.echo(f"before and after: {written}")


def reconstruct(
    model: Annotated[str, typer.Option(help="models:/NAME@champion, or the folder or URL of a model's artifact.")],
    image: Annotated[list[Path], typer.Option(help="An image, of any size. Repeatable.")],
    tracking: Tracking = None,
    out: Annotated[Path, typer.Option(help="Folder for the images.")] = Path("reconstructed"),
) -> None:
    """See what an autoencoder keeps of images: each as the model sees it, its codes as colors, its reconstruction.

    Prints the signal-to-noise ratio of each, and the bits of its codes. Of a cascade it takes the tokenizer.

    **Examples**

    - `cascade reconstruct --model models:/image-cascade-openmoji@champion --image photo.png`
    - `cascade reconstruct --model models:/image-cascade-vqvae-tokenizer@champion --image one.png --image two.jpg`
    - `cascade reconstruct --model s3://bucket/runs/stages/vae/1a2b3c --image photo.png --out kept`
    """
    share_cores()
    from pipelines.command.reconstruct import reconstruct_images

    shown = reconstruct_images(model, images=image, tracking=tracking, out=out, console=Console())
    typer.echo(f"side by side: {shown}")


def ema(
    model: Annotated[str, typer.Option(help="models:/NAME@champion, or the folder or URL of a model's artifact.")],
    length: Annotated[float, typer.Option(help="Of the average, as a share of training: 0.05 to 0.25.")],
    out: Annotated[Path, typer.Option(help="Folder for the model.")],
    tracking: Tracking = None,
) -> None:
    """Choose the length of a model's average of weights, after training: with `ema: power` snapshots were kept for it.

    `cascade sample` takes the folder that it writes where the model makes images by itself. Of a registered model the
    average becomes a version too, of the same name: its `candidate`.

    **Examples**

    - `cascade ema --model models:/image-cascade-edm-base@champion --length 0.15 --out edm-0.15`
    - `cascade ema --model runs/stages/base/1a2b3c --length 0.05 --out edm-0.05`
    """
    from pipelines.command.versions import write_average

    made = write_average(model, length=length, tracking=tracking, out=out)
    typer.echo(f"model: {made.folder}")
    if made.registered:
        typer.echo(f"registered: {made.registered}")


def promote(
    model: Annotated[str, typer.Argument(help="NAME@VERSION or models:/NAME/VERSION; with --back the name alone.")],
    back: Annotated[bool, typer.Option("--back", help="To the champion before.")] = False,
    tracking: Tracking = None,
) -> None:
    """Make a version of a registered model its champion, whatever it measures; services follow within seconds.

    Only this name's alias moves: models of single stages have names of their own.

    **Examples**

    - `cascade promote image-cascade-openmoji@7`
    - `cascade promote models:/image-cascade-openmoji/7`
    - `cascade promote image-cascade-openmoji --back`
    """
    from pipelines.command.versions import promote_version

    typer.echo(promote_version(model, back=back, tracking=tracking))


def serve(
    model: Annotated[
        list[str],
        typer.Option(help="models:/NAME@champion, models:/NAME/3, or a folder; NAME=… in front. Repeatable."),
    ],
    host: Annotated[str, typer.Option(help="Where to listen; keys are needed where others reach it.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Where to listen.", min=1, max=65535)] = 8000,
    tracking: Tracking = None,
    replicas: Annotated[str, typer.Option(help="Of each model: a number, or 1..4 as many as are busy.")] = "1",
    gpus: Annotated[float | None, typer.Option(help="Of a replica, parts too; else 1 where there are.", min=0)] = None,
    batch: Annotated[int, typer.Option(help="Most images that are sampled at a time.", min=1)] = 16,
) -> None:
    """Serve trained models over HTTP: OpenAI's image API, and a page to try them on.

    Ray is started here, or joined where RAY_ADDRESS says. A new champion answers within seconds, without a pause.
    Ends on Ctrl-C.

    **Examples**

    - `cascade serve --model models:/image-cascade-openmoji@champion`
    - `cascade serve --model emoji=models:/image-cascade-openmoji/3 --model gan=models:/image-cascade-gan@champion`
    - `CASCADE_API_KEYS=one,another cascade serve --model models:/image-cascade-openmoji@champion --host 0.0.0.0`
    - `cascade serve --model models:/image-cascade-openmoji@champion --replicas 1..4 --gpus 0.5`
    """
    from pipelines.command.serve import ServeOptions, serve

    serve(ServeOptions(model, host, port, tracking, replicas, gpus, batch), Console())
