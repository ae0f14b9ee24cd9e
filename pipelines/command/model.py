"""Commands on trained models: `import`, `export`, `reconstruct`, `ema`, `promote`, `serve`."""

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from pipelines.command.options import Set, Tracking, share_cores


def import_(
    uri: Annotated[str, typer.Argument(help="A file, or a folder of diffusers: local, s3://, hf://OWNER/NAME/….")],
    out: Annotated[str, typer.Option(help="Folder for the model, local or in storage.")],
    as_: Annotated[
        str | None, typer.Option("--as", help="RECIPE/STAGE that takes the weights; config.json may do without.")
    ] = None,
    set_: Set = [],  # noqa: B006
    tokenizer: Annotated[
        str | None, typer.Option(help="tokenizer.json of a model that reads captions itself: GLIDE, minDALL-E.")
    ] = None,
) -> None:
    """Import published weights: the file says by its names what it is, and every tensor has to fit.

    The model lies in `--out` as any stage's: `cascade sample`, `reconstruct` and `verify` take the folder. Pickles are
    read as tensors alone, or refused; nothing is written before all tensors fit.

    **Examples**

    - `cascade import 256x256_diffusion.pt --as adm_imagenet_256/base --out models/adm`
    - `cascade import 256x256_classifier.pt --as adm_imagenet_256/classifier --out models/adm-classifier`
    - `cascade import hf://stabilityai/sd-vae-ft-mse --out models/vae` (extra `hub`) — config.json says what it is
    - `cascade import vqgan.safetensors --as imagenet_class_prior/tokenizer --out s3://bucket/models/vqgan`
    - `cascade import base.pt --as glide_64_256/base --tokenizer tokenizer.json --out models/glide`
    - `cascade import unet.safetensors --as mine.yaml/base --set base.num_res_blocks=3 --out models/unet`
    """
    share_cores()
    from pipelines.command.upkeep import import_model

    typer.echo(import_model(uri, stage=as_, assignments=set_, out=out, tokenizer=tokenizer))


def export(
    model: Annotated[str, typer.Argument(help="models:/NAME@champion, or the folder or URL of a model or cascade.")],
    as_: Annotated[
        Literal["diffusers", "pt2", "onnx"],
        typer.Option("--as", help="Folders of diffusers, or programs of torch.export (pt2) or of ONNX."),
    ],
    out: Annotated[str, typer.Option(help="New folder for the files, local or in storage.")],
    push: Annotated[
        str | None, typer.Option(help="OWNER/NAME: also to this repository of a hub (extra `hub`).")
    ] = None,
    tracking: Tracking = None,
) -> None:
    """Export a model, or all models of a cascade, to files that others open without this project.

    diffusers: its classes where they compute the same, a `pipeline.py` with a program for other models of diffusion.
    Programs: any network; each is compared before anything is written, and `programs.json` says what the inputs are. A
    cascade's models lie in a folder each, beside the `cascade.json` that says how they compose. `README.md` is a card.

    **Examples**

    - `cascade export models:/image-cascade-ddpm-base@champion --as diffusers --out ddpm` — a DDIMPipeline
    - `cascade export models:/image-cascade-openmoji@champion --as onnx --out openmoji-onnx` (extra `export`)
    - `cascade export runs/stages/base/1a2b3c --as pt2 --out s3://bucket/exported/base`
    - `HF_TOKEN=… cascade export models:/image-cascade-edm/3 --as diffusers --out edm --push me/edm`
    """
    share_cores()
    from pipelines.command.export import export_model

    typer.echo(export_model(model, form=as_, out=out, push=push, tracking=tracking, console=Console()))


def reconstruct(
    model: Annotated[str, typer.Option(help="models:/NAME@champion, or the folder or URL of a model's artifact.")],
    image: Annotated[list[Path], typer.Option(help="An image, of any size. Repeatable.")],
    tracking: Tracking = None,
    out: Annotated[Path, typer.Option(help="Folder for the images.")] = Path("reconstructed"),
) -> None:
    """Draw images beside an autoencoder's reconstructions, with the codes as colors.

    Images are drawn as the model sees them. Prints the signal-to-noise ratio of each, and the bits of its codes. Of a
    cascade it takes the tokenizer.

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
    """Choose the length of a model's average of weights after a training with `ema: power`.

    Snapshots were kept for it. `cascade sample` takes the folder that it writes where the model makes images by itself.
    Of a registered model the average becomes a version too, of the same name: its `candidate`.

    **Examples**

    - `cascade ema --model models:/image-cascade-edm-base@champion --length 0.15 --out edm-0.15`
    - `cascade ema --model runs/stages/base/1a2b3c --length 0.05 --out edm-0.05`
    """
    from pipelines.command.upkeep import write_average

    registered = write_average(model, length=length, tracking=tracking, out=out)
    typer.echo(f"model: {out}")
    if registered:
        typer.echo(f"registered: {registered}")


def promote(
    model: Annotated[str, typer.Argument(help="NAME@VERSION or models:/NAME/VERSION; with --back the name alone.")],
    back: Annotated[bool, typer.Option("--back", help="To the champion before.")] = False,
    tracking: Tracking = None,
) -> None:
    """Make a version of a registered model its champion, whatever its figures.

    Only this name's alias moves, and services follow within seconds: models of single stages have names of their own.

    **Examples**

    - `cascade promote image-cascade-openmoji@7`
    - `cascade promote models:/image-cascade-openmoji/7`
    - `cascade promote image-cascade-openmoji --back`
    """
    from pipelines.command.upkeep import promote_version

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
    from pipelines.command.serve import serve_models

    serve_models(
        model, host=host, port=port, tracking=tracking, replicas=replicas, gpus=gpus, batch=batch, console=Console()
    )
