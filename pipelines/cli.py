"""The `cascade` command."""

import logging
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.logging import RichHandler

from pipelines.in_turn_commands import compare, lecture
from pipelines.options import SAMPLERS, Name, ProfileName, Recipe, RunName, Sampling, Set, Storage, Tracking

app = typer.Typer(
    help="Train, sample and report the systems of the lecture as one resumable workflow.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
WRONG_USE = 2


@app.command()
def run(
    recipe: Recipe = "openmoji",
    set_: Set = [],  # noqa: B006  (typer copies it)
    storage: Storage = None,
    tracking: Tracking = None,
    profile: ProfileName = "auto",
    name: Name = None,
    run_name: RunName = None,
    plan: Annotated[bool, typer.Option("--plan", help="Show what would run, and run nothing.")] = False,
    only: Annotated[list[str], typer.Option(help="Run only this stage. Repeatable.")] = [],  # noqa: B006
    from_: Annotated[str | None, typer.Option("--from", help="Run this stage and what follows it.")] = None,
    until: Annotated[str | None, typer.Option(help="Run this stage and what it needs.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Run the selected stages even where they are cached.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show the log lines of all workers.")] = False,
    cluster: Annotated[
        str | None, typer.Option(help="What its autoscaler will make of the cluster that is joined: gpus=8,cpus=64.")
    ] = None,
) -> None:
    """Train the whole cascade, sample it, register it and write a report.

    Everything finished is cached by content: the same command again goes on where the last one stopped.

    **Examples**

    - `cascade run` — the demo, real images, about a quarter of an hour on two cores
    - `cascade run --recipe smoke` — all stages on a procedural set in about four minutes
    - `cascade run --set base.total_steps=2000 --plan` — what a changed number would run again
    - `cascade run --set images.source=~/photos` — your own images; the models are `image-cascade-photos`
    - `cascade run --set images.source=s3://bucket/tars --storage s3://bucket/runs --tracking http://mlflow:5000`
    """
    from pipelines import driver
    from pipelines.plan_command import show_plan

    options = driver.RunOptions(
        recipe=recipe,
        set=set_,
        storage=storage,
        tracking=tracking,
        profile=profile,
        name=name,
        run=run_name,
        only=only,
        from_=from_,
        until=until,
        force=force,
        verbose=verbose,
        cluster=cluster,
    )
    if plan:
        show_plan(options, [], Console())
        return
    raise typer.Exit(driver.run(options, Console()))


@app.command("plan")
def plan_command(
    recipe: Recipe = "openmoji",
    set_: Set = [],  # noqa: B006
    storage: Storage = None,
    profile: ProfileName = "auto",
    cluster: Annotated[
        list[str],
        typer.Option(help="How this cluster would be shared, though it is not here: gpus=64,cpus=512. Repeatable."),
    ] = [],  # noqa: B006
    only: Annotated[list[str], typer.Option(help="Only this stage. Repeatable.")] = [],  # noqa: B006
    from_: Annotated[str | None, typer.Option("--from", help="This stage and what follows it.")] = None,
    until: Annotated[str | None, typer.Option(help="This stage and what it needs.")] = None,
    force: Annotated[bool, typer.Option("--force", help="As if nothing were cached.")] = False,
) -> None:
    """Show each stage, its key, and whether it is cached; run nothing.

    With --cluster: workers and GPUs of each stage on a cluster that is not here; neither the source of the images nor
    storage is asked. The recipe `published` then stands for all those of papers.

    **Examples**

    - `cascade plan --set base.seed=1`
    - `cascade plan --recipe adm_imagenet_64_256 --cluster gpus=64,cpus=512`
    - `cascade plan --recipe published --cluster gpus=8 --cluster gpus=64`
    """
    from pipelines import driver
    from pipelines.plan_command import show_plan

    options = driver.RunOptions(
        recipe=recipe, set=set_, storage=storage, profile=profile, only=only, from_=from_, until=until, force=force
    )
    show_plan(options, cluster, Console())


@app.command()
def show(recipe: Annotated[str, typer.Argument(help="A recipe by name or a YAML file.")], set_: Set = []) -> None:  # noqa: B006
    """Print a recipe with every number, as YAML that runs when edited: `cascade show openmoji > my.yaml`"""
    from pipelines.recipes.catalog import load_recipe, resolved_yaml

    typer.echo(resolved_yaml(load_recipe(recipe, set_)), nl=False)


@app.command()
def recipes() -> None:
    """List the recipes that come with the package."""
    from pipelines.recipes.catalog import RECIPES

    for name, function in RECIPES.items():
        typer.echo(f"{name:12} {(function.__doc__ or '').strip().splitlines()[0]}")


app.command()(lecture)
app.command()(compare)


@app.command()
def data(
    source: Annotated[str, typer.Argument(help="openmoji, scenes, folder, fashion_mnist or webdataset.")],
    path: Annotated[str | None, typer.Argument(help="Where the images are: a folder, a glob or a URL.")] = None,
    *,
    out: Annotated[str, typer.Option(help="Where shards and index.json go: a folder or any fsspec URL.")],
    resolution: Annotated[int, typer.Option(help="Height and width of the stored images, pixels.", min=8)] = 64,
    samples_per_shard: Annotated[int, typer.Option(help="Images in one tar.", min=1)] = 512,
    limit: Annotated[int | None, typer.Option(help="At most so many images; for scenes their number.", min=1)] = None,
    holdout_fraction: Annotated[float, typer.Option(help="Share that training never sees.", min=0, max=0.9)] = 0.1,
    max_corrupt_fraction: Annotated[float, typer.Option(help="Share that may be corrupt.", min=0, max=1)] = 0.01,
    vocab_size: Annotated[int, typer.Option(help="Ids of the caption tokenizer.", min=260)] = 1024,
    text_length: Annotated[int, typer.Option(help="Ids of one caption.", min=4)] = 16,
) -> None:
    """Write WebDataset tars and an index that any recipe trains on, in parallel.

    **Examples**

    - `cascade data openmoji --out data/openmoji --resolution 256`
    - `cascade data folder ~/photos --out s3://bucket/shards`
    - `cascade data webdataset 's3://bucket/tars/*.tar' --out data/index` (tars stay where they are)
    """
    from components.data.ingest import IngestConfig
    from pipelines.data_command import write_shards

    config = IngestConfig(
        resolution=resolution,
        samples_per_shard=samples_per_shard,
        holdout_fraction=holdout_fraction,
        vocab_size=vocab_size,
        text_length=text_length,
        limit=limit,
        max_corrupt_fraction=max_corrupt_fraction,
    )
    write_shards(source, path, out=out, config=config, console=Console())


@app.command()
def sample(
    model: Annotated[str, typer.Option(help="models:/NAME@champion, or the folder or URL of a cascade artifact.")],
    label: Annotated[list[str], typer.Option(help="Class name or number. Repeatable.")] = [],  # noqa: B006
    prompt: Annotated[list[str], typer.Option(help="A text. Repeatable.")] = [],  # noqa: B006
    condition: Annotated[list[Path], typer.Option(help="Condition image, or 16-bit depth map. Repeatable.")] = [],  # noqa: B006
    generator: Annotated[str | None, typer.Option(help="diffusion, tokens, pixels, gan, vae; else the first.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the first image; the others count on.", min=0)] = 0,
    count: Annotated[int, typer.Option(help="Images for each label or prompt.", min=1)] = 4,
    steps: Annotated[int | None, typer.Option(help="Denoising steps of the base model.", min=1)] = None,
    sampler: Annotated[str | None, typer.Option(help=f"Of the base model: {SAMPLERS}.")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="1 turns guidance off.", min=0)] = None,
    classifier_scale: Annotated[float | None, typer.Option(help="Scale of the classifier; 0 is off.", min=0)] = None,
    truncation: Annotated[float | None, typer.Option(help="GAN: greatest |z| of the noise, such as 0.5.")] = None,
    best_of: Annotated[int | None, typer.Option(help="Token branch: keep the best of so many.", min=1)] = None,
    size: Annotated[str | None, typer.Option(help="Token branch: a larger image, HEIGHTxWIDTH in pixels.")] = None,
    settings: Sampling = [],  # noqa: B006
    tracking: Tracking = None,
    out: Annotated[Path, typer.Option(help="Folder for the images and the grid.")] = Path("samples"),
) -> None:
    """Sample a trained model: images and a labelled grid.

    **Examples**

    - `cascade sample --model models:/image-cascade-openmoji@champion --label flags --label animals-nature`
    - `cascade sample --model models:/image-cascade-openmoji@champion --prompt "red heart" --count 8 --seed 7`
    - `cascade sample --model models:/image-cascade-openmoji@champion --generator tokens --prompt car --best-of 8`
    - `cascade sample --model models:/image-cascade-depth@champion --condition depth.png`
    - `cascade sample --model models:/image-cascade-ddpm@champion --sampler ddim --steps 25`
    - `cascade sample --model models:/image-cascade-openmoji@champion --prompt car --set upsampler_64.noise_level=20`
    - `cascade sample --model models:/image-cascade-classifier_guided@champion --label flags --classifier-scale 2`
    - `cascade sample --model models:/image-cascade-gan@champion --label flags --truncation 0.5`
    """
    from pipelines.sample_command import sample_images

    written = sample_images(
        model,
        labels=label,
        prompts=prompt,
        conditions=condition,
        generator=generator,
        seed=seed,
        count=count,
        steps=steps,
        sampler=sampler,
        guidance_scale=guidance_scale,
        classifier_scale=classifier_scale,
        truncation=truncation,
        settings=settings,
        best_of=best_of,
        size=size,
        tracking=tracking,
        out=out,
        console=Console(),
    )
    typer.echo(f"grid: {written}")


@app.command()
def translate(
    model: Annotated[str, typer.Option(help="models:/NAME@champion, or the folder or URL of a cascade artifact.")],
    image: Annotated[Path, typer.Option(help="The image to work on, of the model's size.")],
    mask: Annotated[Path | None, typer.Option(help="White where pixels are to be made; of the image's size.")] = None,
    task: Annotated[
        str | None,
        typer.Option(help="inpainting, uncropping, colorization, jpeg or super_resolution; else its only one."),
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="What is to be seen, where the model takes a text.")] = None,
    label: Annotated[str | None, typer.Option(help="Class name or number, where the model takes one.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the first image; the others count on.", min=0)] = 0,
    count: Annotated[int, typer.Option(help="Images to make of it.", min=1)] = 1,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.", min=1)] = None,
    sampler: Annotated[str | None, typer.Option(help=f"One of {SAMPLERS}.")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="1 turns guidance off.", min=0)] = None,
    settings: Sampling = [],  # noqa: B006
    tracking: Tracking = None,
    out: Annotated[Path, typer.Option(help="Folder for the images.")] = Path("translated"),
) -> None:
    """Work on an image: fill masks, extend it, color it, restore it, enlarge it.

    Pixels that the mask leaves black stay exactly as they are.

    **Examples**

    - `cascade translate --model models:/palette@champion --image photo.png --mask mask.png --task inpainting`
    - `cascade translate --model models:/palette@champion --image gray.png --task colorization --count 4`
    - `cascade translate --model models:/glide@champion --image photo.png --mask mask.png --prompt "red heart"`
    """
    from pipelines.translate_command import translate_image

    written = translate_image(
        model,
        image=image,
        mask=mask,
        task=task,
        label=label,
        prompt=prompt,
        seed=seed,
        count=count,
        steps=steps,
        sampler=sampler,
        guidance_scale=guidance_scale,
        settings=settings,
        tracking=tracking,
        out=out,
        console=Console(),
    )
    typer.echo(f"before and after: {written}")


@app.command()
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
    from pipelines.reconstruct_command import reconstruct_images

    shown = reconstruct_images(model, images=image, tracking=tracking, out=out, console=Console())
    typer.echo(f"side by side: {shown}")


@app.command()
def report(
    run_name: Annotated[str | None, typer.Option("--run", help="Name of the run; the newest one if left out.")] = None,
    storage: Storage = None,
) -> None:
    """Render a run's report again from what is in storage. Example: `cascade report --run openmoji-1a2b3c`"""
    from components.storage.store import Store
    from pipelines.profiles import storage_uri
    from pipelines.run_report import newest_run, render_run

    root = Store(storage_uri(storage))
    typer.echo(f"report: {render_run(root, run_name or newest_run(root))[0]}")


@app.command()
def verify(
    name: Annotated[str | None, typer.Argument(metavar="RUN", help="Name of the run; the newest if left out.")] = None,
    run_name: RunName = None,
    storage: Storage = None,
) -> None:
    """Read every artifact of a run and compare sizes and sha256 with its manifest: `cascade verify openmoji-1a2b3c`

    Prints a line for each file that is missing or differs; the exit code is then 1.
    """
    from pipelines.verify_command import verify_run

    raise typer.Exit(verify_run(name or run_name, storage=storage, console=Console()))


@app.command()
def gc(
    storage: Storage = None,
    unused: Annotated[bool, typer.Option(help="Also stages that no run in storage uses.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Delete; without it only the plan is shown.")] = False,
) -> None:
    """Find what no manifest lists (old tries, finished training state) and delete it with --yes."""
    from pipelines.gc_command import collect_garbage

    collect_garbage(storage, unused=unused, delete=yes)


def run_script() -> None:
    """`python pipelines/full_cascade.py`: the options of `cascade run` without the command's name."""
    script = typer.Typer(pretty_exceptions_enable=False, rich_markup_mode="markdown")
    script.command()(run)
    main(script)


def main(command: typer.Typer = app) -> None:
    """Run a command; what the user got wrong ends in one line on stderr and exit code 2."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", datefmt="%X", handlers=[_handler()], force=True)
    logging.getLogger("cascade").setLevel(logging.INFO)
    try:
        command()
    except Exception as error:
        if not _is_wrong_use(error):
            raise
        typer.echo(f"error: {error}", err=True)
        sys.exit(WRONG_USE)


def _handler() -> logging.Handler:
    if sys.stderr.isatty():
        return RichHandler(show_path=False, show_level=False)
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    return handler


def _is_wrong_use(error: Exception) -> bool:
    from components.data.errors import SourceError
    from components.storage.store import StoreError
    from pipelines.workflow import UsageError

    return isinstance(error, UsageError | StoreError | SourceError)
