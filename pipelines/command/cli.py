"""The `cascade` command."""

import logging
import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.logging import RichHandler

from components.configuration.usage import UsageError, usage_errors
from components.runtime.tracking.names import environment
from pipelines.command import evaluate, model, options, sample
from pipelines.engine.provenance import code_line, commit

app = typer.Typer(
    help="Train, sample and report the systems of the lecture as one resumable workflow.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
WRONG_USE = 2
Figures = Annotated[
    Path | None, typer.Option("--json", help="A file that gets the figures of what is finished, with commit and date.")
]


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(code_line(commit()))
        raise typer.Exit


@app.callback()
def options_of_all(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Show version and commit.")
    ] = False,
) -> None:
    os.environ.update(environment() | os.environ)  # of MLflow's client


@app.command()
def run(
    recipe: options.Recipe = "scenes",
    set_: options.Set = [],  # noqa: B006  (typer copies it)
    storage: options.Storage = None,
    tracking: options.Tracking = None,
    profile: options.ProfileName = "auto",
    name: options.Name = None,
    run_name: options.RunName = None,
    promote: options.Promote = "better",
    plan: Annotated[bool, typer.Option("--plan", help="Show what would run, and run nothing.")] = False,
    only: options.Only = [],  # noqa: B006
    from_: options.From = None,
    until: options.Until = None,
    force: options.Force = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show the log lines of all workers.")] = False,
    profile_steps: Annotated[
        str | None,
        typer.Option(
            metavar="FIRST:LAST",
            help="Record these steps of each training that runs, 20:25, with torch.profiler; the run's folder gets a "
            "Chrome trace of each.",
        ),
    ] = None,
    cluster: Annotated[
        str | None, typer.Option(help="What its autoscaler will make of the cluster that is joined: gpus=8,cpus=64.")
    ] = None,
    fastest: options.Fastest = None,
) -> None:
    """Train the whole cascade, sample it, register it and write a report.

    Everything finished is cached by content: the same command again goes on where the last one stopped. Exit codes: 0
    done, 1 failed, 2 wrong use, 3 done but not registered (`cascade register` does it), 130 interrupted.

    **Examples**

    - `cascade run` — the demo, scenes by caption, 16 to 28 minutes on two cores
    - `cascade run --recipe openmoji` — the same cascade on drawings, by class and caption
    - `cascade run --recipe smoke` — all stages on a procedural set in about four minutes
    - `cascade run --set base.total_steps=2000 --plan` — what a changed number would run again
    - `cascade run --recipe openmoji --set images.source=~/photos` — your own; the models are `image-cascade-photos`
    - `cascade run --promote never` — a trial: the champion stays, whatever it measures
    - `cascade run --recipe openmoji --set images.source=s3://bucket/tars --storage s3://bucket/runs`
    """
    from pipelines.command.plan import show_keys
    from pipelines.engine import driver

    # fmt: off
    chosen = driver.RunOptions(
        recipe=recipe, set=set_, storage=storage, tracking=tracking, profile=profile, name=name, run=run_name,
        only=only, from_=from_, until=until, force=force, verbose=verbose, profile_steps=profile_steps,
        cluster=cluster, promote=promote, fastest=fastest)
    # fmt: on
    if plan:
        show_keys(chosen, Console())
        return
    raise typer.Exit(driver.run(chosen, Console()))


@app.command("plan")
def plan_command(
    recipe: options.Recipe = "scenes",
    set_: options.Set = [],  # noqa: B006
    storage: options.Storage = None,
    profile: options.ProfileName = "auto",
    cluster: Annotated[
        list[str],
        typer.Option(help="How a cluster that is not here would be shared: gpus=64,cpus=512,network=efa. Repeatable."),
    ] = [],  # noqa: B006
    gpu: Annotated[str | None, typer.Option(help="What that costs on such GPUs: a100, h100, h200, l4 or l40s.")] = None,
    price: Annotated[float | None, typer.Option(help="Of an hour of one of them, in any currency.", min=0)] = None,
    mfu: Annotated[float | None, typer.Option(help="Share of their peak in bf16 that products reach.  [0.45]")] = None,
    images: Annotated[
        int | None, typer.Option(help="How many the set has, for stages that go through it once.", min=1)
    ] = None,
    only: options.Only = [],  # noqa: B006
    from_: options.From = None,
    until: options.Until = None,
    force: options.Force = False,
    fastest: options.Fastest = None,
) -> None:
    """Show each stage, its key, and whether it is cached; run nothing.

    With --cluster: workers and GPUs of each stage on a cluster that is not here; neither the source of the images nor
    storage is asked. The recipe `published` then stands for all those of papers.

    With --gpu: what each stage costs there, and each training on how many of them. Operations are counted, a step's
    seconds modeled. A training takes the GPUs at the knee: the least product of hours and price.

    **Examples**

    - `cascade plan --set base.seed=1`
    - `cascade plan --recipe adm_imagenet_64_256 --cluster gpus=64,cpus=512`
    - `cascade plan --recipe published --cluster gpus=8 --cluster gpus=64`
    - `cascade plan --recipe adm_imagenet_256 --cluster gpus=64 --gpu h100 --price 2.5`
    - `cascade plan --recipe imagenet_class_prior --cluster gpus=64 --gpu h100 --images 1281167`
    - `cascade plan --recipe published --cluster gpus=64 --gpu h100 --price 2.5`
    """
    from pipelines.command.plan import show_costs
    from pipelines.engine import driver

    # fmt: off
    chosen = driver.RunOptions(
        recipe=recipe, set=set_, storage=storage, profile=profile, only=only, from_=from_, until=until, force=force,
        fastest=fastest)
    # fmt: on
    show_costs(chosen, cluster, Console(), gpu=gpu, price=price, mfu=mfu, images=images)


@app.command()
def show(
    recipe: Annotated[str, typer.Argument(help="A recipe by name or a YAML file.")],
    set_: options.Set = [],  # noqa: B006
) -> None:
    """Print a recipe with every number, as YAML that runs when edited: `cascade show scenes > my.yaml`"""
    from pipelines.recipes.catalog import load_recipe, resolved_yaml

    typer.echo(resolved_yaml(load_recipe(recipe, set_)), nl=False)


@app.command()
def recipes() -> None:
    """List the recipes that come with the package."""
    from pipelines.recipes.catalog import RECIPES

    for name, row in RECIPES.items():
        typer.echo(f"{name:12} {row.summary}")


@app.command()
def data(
    source: Annotated[
        str, typer.Argument(help="openmoji, scenes, folder, parquet, fashion_mnist, photographs or webdataset.")
    ],
    path: Annotated[str | None, typer.Argument(help="Where the images are: a folder, a glob or a URL.")] = None,
    *,
    out: Annotated[str, typer.Option(help="Where shards and index.json go: a folder or any fsspec URL.")],
    resolution: Annotated[
        int | None, typer.Option(help="Height and width of the stored images, pixels: 64; tars keep theirs.", min=8)
    ] = None,
    samples_per_shard: Annotated[
        int | None,
        typer.Option(
            help="Images in one tar: 512; of tars that are written again 256 (`cascade plan` says what recipes need).",
            min=1,
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="At most so many images; for scenes their number.", min=1)] = None,
    holdout_fraction: Annotated[float, typer.Option(help="Share that training never sees.", min=0, max=0.9)] = 0.1,
    max_corrupt_fraction: Annotated[float, typer.Option(help="Share that may be corrupt.", min=0, max=1)] = 0.01,
    vocab_size: Annotated[int, typer.Option(help="Ids of the caption tokenizer.", min=260)] = 1024,
    text_length: Annotated[int, typer.Option(help="Ids of one caption.", min=4)] = 16,
    image_column: Annotated[str | None, typer.Option(help="Of Parquet or a captions file: images, or files.")] = None,
    caption_column: Annotated[str | None, typer.Option(help="Likewise; a common name is found.")] = None,
    label_column: Annotated[str | None, typer.Option(help="Likewise: the classes.")] = None,
) -> None:
    """Write WebDataset tars with an index, for `cascade run --recipe openmoji --set images.source=OUT`.

    Works in parallel. Each image is looked at once; what can't be decoded is left out and counted. What was stopped
    goes on with the same command, and reads nothing again that is done.

    Columns of Parquet files and of captions files are found by their common names (image, file_name; caption, text;
    label, class); what is not read is named in a warning. Of a set with train, validation and test, train is read.

    **Examples**

    - `cascade data openmoji --out data/openmoji --resolution 256`
    - `cascade data folder ~/photos --out s3://bucket/shards`
    - `cascade data webdataset 's3://bucket/tars/*.tar' --out s3://bucket/shards` — large tars as small ones, which many
      readers fetch once; images stay as they are
    - `cascade data webdataset tars --out shards --samples-per-shard 256` — of another size
    - `cascade data parquet hf://datasets/OWNER/NAME --out data/name` (`HF_TOKEN` for a set that asks for one)
    - `cascade data parquet 's3://bucket/set/*.parquet' --label-column species --out data/species`
    """
    from components.data.ingest import IngestConfig
    from components.data.sources.source import Columns
    from pipelines.command.data import default_samples, write_shards

    if source == "webdataset" and resolution is not None:
        raise UsageError(
            "--resolution: the images of tars stay as they are; leave it out, a recipe resizes them when they are read"
        )
    config = IngestConfig(
        resolution=resolution or 64,
        samples_per_shard=samples_per_shard or default_samples(source),
        holdout_fraction=holdout_fraction,
        vocab_size=vocab_size,
        text_length=text_length,
        limit=limit,
        max_corrupt_fraction=max_corrupt_fraction,
        columns=Columns(image=image_column, caption=caption_column, label=label_column),
    )
    write_shards(source, path, out=out, config=config, console=Console())


@app.command()
def lecture(
    names: Annotated[list[str] | None, typer.Argument(help="Rows (T3) or recipes (vqgan); all if left out.")] = None,
    storage: options.Storage = None,
    tracking: options.Tracking = None,
    profile: options.ProfileName = "auto",
    figures: Figures = None,
) -> None:
    """Run the lecture, each system by its own recipe; after each, write the page `lecture.html`.

    Finished stages are cached, so the command goes on where it was stopped. The page lies in storage.

    **Examples**

    - `cascade lecture` — all of it, a few minutes a recipe on two cores
    - `cascade lecture T1 G1 maskgit` — three of them
    """
    from pipelines.suites.lecture import Lecture, run_lecture

    suite = Lecture(storage, tracking=tracking, profile=profile, figures=figures)
    raise typer.Exit(run_lecture(suite, names or [], Console()))


@app.command()
def compare(
    systems: Annotated[list[str] | None, typer.Argument(help="Systems, such as gan or ddpm; all if left out.")] = None,
    seed: Annotated[int, typer.Option(help="Of trainings and samples; rows of other seeds stay.", min=0)] = 0,
    minutes: Annotated[list[int] | None, typer.Option(help="Budget of one core: 2, 8 or 32; all if left out.")] = None,
    storage: options.Storage = None,
    tracking: options.Tracking = None,
    profile: options.ProfileName = "auto",
    figures: Figures = None,
) -> None:
    """Measure the lecture's taxonomy, VAE to GAN to cascade, on the same images of 32².

    Each is trained anew for 2 and 8 minutes of one core, five for 32 too, and on scenes for 8. `compare.html` in
    storage has table, curves over minutes, and where diffusion beats the GAN. The command goes on when stopped.

    **Examples**

    - `cascade compare` — all of them, about eight hours of one core
    - `cascade compare gan ddpm --minutes 2 --seed 1` — two of them with another seed: both trainings are in the table
    """
    from pipelines.suites.compare import Comparison, run_compare

    suite = Comparison(storage, tracking=tracking, profile=profile, figures=figures)
    raise typer.Exit(run_compare(suite, systems or [], Console(), seed=seed, minutes=minutes or ()))


for body in (sample.sample, evaluate.evaluate, sample.translate):
    app.command()(body)
import_command = app.command("import")(model.import_)
for body in (model.export, model.reconstruct, model.ema, model.promote, model.register, model.serve):
    app.command()(body)


@app.command()
def report(
    run_name: Annotated[str | None, typer.Option("--run", help="Name of the run; the newest one if left out.")] = None,
    storage: options.Storage = None,
) -> None:
    """Render a run's report again from what is in storage. Example: `cascade report --run scenes-1a2b3c`"""
    from components.runtime.storage.store import Store
    from pipelines.engine.run_report import newest_run, render_run
    from pipelines.planning.profiles import storage_uri

    root = Store(storage_uri(storage))
    typer.echo(f"report: {render_run(root, run_name or newest_run(root))[0]}")


@app.command()
def verify(
    name: Annotated[str | None, typer.Argument(metavar="RUN", help="Name of the run; the newest if left out.")] = None,
    run_name: options.RunName = None,
    model: Annotated[
        str | None, typer.Option(help="This model in place of a run: models:/NAME@champion, a folder or URL.")
    ] = None,
    storage: options.Storage = None,
    tracking: options.Tracking = None,
) -> None:
    """Read every artifact of a run, or every file of a model, and compare sizes and sha256.

    Prints a line for each file that is missing, changed or added; the exit code is then 1.

    **Examples**

    - `cascade verify scenes-1a2b3c` — by sizes and sha256 of the stages' manifests
    - `cascade verify --model models:/image-cascade-scenes@champion` — by the list that the version carries
    """
    from pipelines.command.upkeep import model_differences, verdict, verify_run
    from pipelines.planning.profiles import tracking_uri

    if [name, run_name, model].count(None) < 2:
        raise UsageError("name one thing to verify: RUN, --run or --model")
    if model is None:
        raise typer.Exit(verify_run(name or run_name, storage=storage, console=Console()))
    with usage_errors():
        bad = model_differences(model, tracking_uri(tracking))
    raise typer.Exit(verdict(model, bad, "all files as they were registered", Console()))


@app.command()
def gc(
    storage: options.Storage = None,
    unused: Annotated[bool, typer.Option(help="Also stages that no run in storage uses.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Delete; without it only the plan is shown.")] = False,
) -> None:
    """Find what no manifest lists (old tries, finished training state) and delete it with --yes."""
    from components.runtime.storage.garbage import collect, find_garbage
    from components.runtime.storage.store import Store
    from pipelines.planning.profiles import storage_uri

    root = Store(storage_uri(storage))
    garbage = find_garbage(root, unused=unused, on_wait=lambda line: typer.echo(line, err=True))
    for folder in garbage:
        typer.echo(f"{folder.bytes / 1e6:10.1f} MB  {folder.path}  ({folder.reason})")
    gone = collect(root, garbage, unused=unused) if yes else garbage
    total = sum(folder.bytes for folder in gone) / 1e6
    typer.echo(f"{len(gone)} folders, {total:.1f} MB {'deleted' if yes else '(delete them with --yes)'}")
    for folder in garbage:
        if folder not in gone:
            typer.echo(f"left alone, it is needed again: {folder.path}")


def run_script() -> None:
    """`python pipelines/full_cascade.py`: the options of `cascade run` without the command's name."""
    script = typer.Typer(pretty_exceptions_enable=False, rich_markup_mode="markdown")
    script.command()(run)
    main(script)


def main(command: typer.Typer = app) -> None:
    """Run a command; wrong use ends in a line on stderr and exit code 2, other errors in their traceback."""
    handler: logging.Handler = RichHandler(show_path=False, show_level=False)
    if not sys.stderr.isatty():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    logging.basicConfig(level=logging.WARNING, format="%(message)s", datefmt="%X", handlers=[handler], force=True)
    logging.getLogger("cascade").setLevel(logging.INFO)
    try:
        command()
    except Exception as error:
        from components.data.listing import DataError, ShardError, SourceError
        from components.runtime.storage.artifact import ArtifactError
        from components.runtime.storage.store import StoreError

        if not isinstance(error, UsageError | StoreError | ArtifactError | SourceError | ShardError | DataError):
            raise
        typer.echo(f"error: {error}", err=True)
        sys.exit(WRONG_USE)
