"""Commands on models: `import`, `export`, `reconstruct`, `ema`, `promote`, `register`, `serve`."""

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.progress import Progress

from components.configuration.usage import UsageError, usage_errors
from components.runtime.storage.scratch import scratch_folder
from pipelines.command.options import Set, Storage, Tracking, check_out, share_cores

Artifact = Annotated[str, typer.Option(help="models:/NAME@champion, or the folder or URL of a model's artifact.")]


def import_(
    uri: Annotated[
        str,
        typer.Argument(help="A file, a folder of diffusers or of a model of ours: local, s3://, hf://OWNER/NAME/…."),
    ],
    out: Annotated[str, typer.Option(help="Folder for the model, local or in storage.")],
    as_: Annotated[
        str | None, typer.Option("--as", help="RECIPE/STAGE that takes the weights; config.json may do without.")
    ] = None,
    set_: Set = [],  # noqa: B006
    tokenizer: Annotated[
        str | None,
        typer.Option(
            help="tokenizer.json of a model that reads captions itself, or of a Stable Diffusion in one file."
        ),
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
    - `cascade import last.ckpt --as imagenet_class_prior/cascade --out models/cin` — all models of one checkpoint
    - `cascade import base.pt --as glide_64_256/base --tokenizer tokenizer.json --out models/glide`
    - `cascade import v1-5-pruned-emaonly.safetensors --tokenizer tokenizer.json --out models/sd`
    - `cascade import s3://other/runs/stages/base/1a2b3c --out models/base` — a model of ours, with its origin
    - `cascade import unet.safetensors --as mine.yaml/base --set base.num_res_blocks=3 --out models/unet`
    """
    share_cores()
    from components.configuration.families import family_of
    from components.runtime.storage.artifact import load_artifact
    from components.runtime.storage.store import Store, absolute
    from components.runtime.tracking.names import REGISTRY
    from components.runtime.tracking.registry import is_model_folder
    from components.weights.files import read_tokenizer, read_weights
    from components.weights.importing import import_own, import_parts, import_weights
    from components.weights.stable_diffusion import import_pipeline, import_single_file, is_pipeline, version_of
    from pipelines.command.loading import local_model
    from pipelines.command.upkeep import targets_of

    if set_ and as_ is None:
        raise UsageError(f"--set {set_[0]} changes the recipe of --as: name one, or leave --set out")
    check_out(out)
    targets, sampling = ({}, None) if as_ is None else targets_of(as_, set_)
    target = next(iter(targets.values()), None)
    with usage_errors():
        before = None if uri.startswith(REGISTRY) else load_artifact(Store(absolute(uri)))
        if uri.startswith(REGISTRY) or before is not None or is_model_folder(uri):
            if target is not None or tokenizer is not None:
                raise UsageError(f"{uri} is a model of ours, which says what it is: leave --as and --tokenizer out")
            with local_model(uri, None) as folder:
                copied = import_own(folder, uri, before, out=Store(absolute(out)))
            return typer.echo(f"model: {copied.identity} in {out}\nnext: cascade verify --model {out}")
        if target is None and tokenizer is None and is_pipeline(uri):
            return echo_cascade(import_pipeline(uri, out=Store(absolute(out))).identity, out)
        words, weights = None if tokenizer is None else read_tokenizer(tokenizer), read_weights(uri)
        if target is None and (version := version_of(weights)):
            return echo_cascade(import_single_file(weights, version, words, out=Store(absolute(out))).identity, out)
        if sampling is not None:
            artifact, found = import_parts(weights, targets, sampling, out=Store(absolute(out)), tokenizer=words)
            for part, (family, own, _) in found.items():
                typer.echo(f"{part}: {family.title}, {len(own)} tensors read, 0 missing, 0 unused")
            seen = " --condition image.png" if "condition" in found else ""
            return typer.echo(f"model: {artifact.identity} in {out}\nnext: cascade sample --model {out}{seen}")
        made = import_weights(weights, target, out=Store(absolute(out)), tokenizer=words)
    kind, network, settings, module = made.bundle
    classes = f", {network['num_classes']} classes" if network.get("num_classes") else ""
    family, own, left_out = made.recognized
    others = f", {left_out} of training or other models left out" if left_out else ""
    parameters = f"{sum(parameter.numel() for parameter in module.parameters()):,} parameters{classes}"
    typer.echo(f"{family.title}: {len(own)} tensors read, 0 missing, 0 unused{others}; {parameters}")
    alone = settings.get("role") == "base" and "latent_scale" not in settings and not network.get("text_states_dim")
    command = f"sample --model {out}" if alone else f"verify --model {out}"
    if family_of(kind).reconstructs:
        command = f"reconstruct --model {out} --image {'map' if network.get('image_channels', 3) > 3 else 'photo'}.png"
    typer.echo(f"model: {made.artifact.identity} in {out}\nnext: cascade {command}")


def echo_cascade(identity: str, out: str) -> None:
    typer.echo(f"base, autoencoder and text_encoder\nmodel: {identity} in {out}")
    typer.echo(f'next: cascade sample --model {out} --prompt "a red apple"')


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
    samples: Annotated[int, typer.Option(help="Images that the model makes for the card.", min=0, max=64)] = 0,
    tracking: Tracking = None,
) -> None:
    """Export a model, or all models of a cascade, to files that others open without this project.

    diffusers: its classes where they compute the same, a `pipeline.py` with a program for other models of diffusion.
    Programs: any network; each is compared before anything is written, and `programs.json` says what the inputs are. A
    cascade's models lie in a folder each, beside the `cascade.json` that says how they compose. `README.md` is a card.

    **Examples**

    - `cascade export models:/image-cascade-ddpm-base@champion --as diffusers --out ddpm` — a DDIMPipeline
    - `cascade export models:/image-cascade-scenes@champion --as onnx --out scenes-onnx` (extra `export`)
    - `cascade export runs/stages/base/1a2b3c --as pt2 --out s3://bucket/exported/base`
    - `HF_TOKEN=… cascade export models:/image-cascade-edm/3 --as diffusers --samples 16 --out edm --push me/edm`
    """
    share_cores()
    from components.evaluation.gallery import sample_grid
    from components.runtime.storage.connection import shown
    from components.runtime.storage.store import Store, absolute, list_url
    from components.runtime.tracking import registry
    from components.weights.exporting import SAMPLES, push_to, send, write_card, write_parts
    from components.weights.files import CARD
    from pipelines.command.loading import load_cascade, local_model
    from pipelines.command.upkeep import known_of

    store = Store(absolute(out))
    if list_url(store.uri):
        raise UsageError(f"--out {out} holds something already: name a new folder")
    check_out(out)
    if push is not None and find_spec("huggingface_hub") is None:
        raise UsageError("--push needs huggingface_hub: pip install 'image-cascade[hub]'")
    title = named[1] if (named := registry.NAMED.fullmatch(model)) else model.rstrip("/").rpartition("/")[2]
    # All is made and compared in a scratch folder; the place that the user named is written last.
    with usage_errors(), local_model(model, tracking) as folder, scratch_folder("export") as made:
        with Progress(console=Console(), transient=True) as bar:
            bar.add_task("exporting and comparing", total=None)
            cascade = load_cascade(model, tracking) if samples else None  # a model that makes none is refused first
            lines = write_parts(folder, made, as_, title)
            if cascade is not None:
                (made / SAMPLES).write_bytes(sample_grid(cascade, count=samples))
        if find_spec("huggingface_hub") is not None:
            write_card(made / CARD, title, lines, form=as_, known=known_of(model, tracking))
        send(made, store)
        pushed = [] if push is None else [f"pushed: {push_to(push, made)}"]
    typer.echo("\n".join([*lines, f"exported: {shown(store.uri)}", *pushed]))


def reconstruct(
    model: Artifact,
    image: Annotated[list[Path], typer.Option(help="An image, of any size. Repeatable.")],
    tracking: Tracking = None,
    out: Annotated[Path, typer.Option(help="Folder for the images.")] = Path("reconstructed"),
) -> None:
    """Draw images beside an autoencoder's reconstructions, with the codes as colors.

    Images are drawn as the model sees them. Prints the signal-to-noise ratio of each, and the bits of its codes. Of a
    cascade it takes the tokenizer.

    **Examples**

    - `cascade reconstruct --model models:/image-cascade-scenes@champion --image photo.png`
    - `cascade reconstruct --model models:/image-cascade-vqvae-tokenizer@champion --image one.png --image two.jpg`
    - `cascade reconstruct --model s3://bucket/runs/stages/vae/1a2b3c --image photo.png --out kept`
    """
    share_cores()
    from pipelines.command.reconstruct import reconstruct_images

    shown = reconstruct_images(model, images=image, tracking=tracking, out=out, console=Console())
    typer.echo(f"side by side: {shown}")


def ema(
    model: Artifact,
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

    - `cascade promote image-cascade-scenes@7`
    - `cascade promote models:/image-cascade-scenes/7`
    - `cascade promote image-cascade-scenes --back`
    """
    from components.runtime.tracking.names import REGISTRY
    from components.runtime.tracking.promotion import promote_by_hand
    from pipelines.planning.profiles import tracking_uri

    uri = tracking_uri(tracking)
    if uri is None:
        raise UsageError(f"{model} is in a registry: name it with --tracking")
    with usage_errors():
        name, version, before = promote_by_hand(model, tracking_uri=uri, back=back)
    again = "" if before in (None, version) else f"; to take it back: cascade promote {name}@{before}"
    typer.echo(f"{REGISTRY}{name}@champion is version {version}{again}")


def register(
    run: Annotated[str | None, typer.Argument(help="Name of the run; the newest if left out.")] = None,
    storage: Storage = None,
    tracking: Tracking = None,
) -> None:
    """Send MLflow what it lacks of a run that ended while MLflow was away, and register its models.

    `cascade run` ends with exit code 3 then. What is left lies in the run's folder in storage, so any machine will do.
    Doing it twice changes nothing; while MLflow still lacks something the exit code is 3 again.

    **Examples**

    - `cascade register scenes-1a2b3c`
    - `cascade register --storage s3://bucket/runs --tracking http://mlflow:5000` — the newest run there
    """
    from pipelines.command.upkeep import register_run

    raise typer.Exit(register_run(run, storage=storage, tracking=tracking, console=Console()))


def serve(
    model: Annotated[
        list[str], typer.Option(help="models:/NAME@champion, models:/NAME/3, or a folder; NAME=… in front. Repeatable.")
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

    - `cascade serve --model models:/image-cascade-scenes@champion`
    - `cascade serve --model scenes=models:/image-cascade-scenes/3 --model gan=models:/image-cascade-gan@champion`
    - `CASCADE_API_KEYS_FILE=keys cascade serve --model models:/image-cascade-scenes@champion --host 0.0.0.0`
    - `cascade serve --model models:/image-cascade-scenes@champion --replicas 1..4 --gpus 0.5`
    """
    from pipelines.command.serve import serve_models

    serve_models(model, host=host, port=port, tracking=tracking, replicas=replicas, gpus=gpus, batch=batch)
