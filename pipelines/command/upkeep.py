"""Upkeep of runs and models: `cascade verify`, `gc`, `import`, `ema` and `promote`.

A registered model carries the list of its files with it. Garbage are folders that no manifest lists.
"""

import tempfile
from pathlib import Path

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from components.configuration.families import family_of
from components.configuration.optimization import Training
from components.configuration.usage import UsageError, usage_errors
from components.models.bundle import DESCRIPTION
from components.models.file_list import LIST, differences
from components.runtime.storage.artifact import Artifact, ArtifactError, load_artifact, verify_files
from components.runtime.storage.garbage import collect, find_garbage
from components.runtime.storage.store import Store, absolute
from components.runtime.tracking.names import REGISTRY, environment
from components.weights.files import read_tokenizer, read_weights
from components.weights.importing import Target, import_weights
from pipelines.engine.run_report import load_plan, newest_run
from pipelines.engine.session import set_environment
from pipelines.planning.profiles import storage_uri, tracking_uri
from pipelines.recipes.catalog import load_recipe
from pipelines.workflows import build_workflow

SOUND, DAMAGED = 0, 1


def verify_run(run: str | None, *, storage: str | None, console: Console) -> int:
    """Check the artifacts of a run; returns the exit code: 0 sound, 1 damaged.
    The run is the newest if `run` is None. Raises UsageError if there is no such run, StoreError if storage can't be
    reached."""
    root = Store(storage_uri(storage))
    run = run or newest_run(root)
    artifacts, bad = committed(root, run)
    total = sum(entry.bytes for artifact in artifacts for entry in artifact.files)
    columns = [TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()]
    with Progress(*columns, TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task(run, total=total)
        for artifact in artifacts:
            bar.update(task, description=artifact.stage)
            bad += verify_files(artifact.store, artifact.files, on_file=lambda entry: bar.advance(task, entry.bytes))
    files = sum(len(artifact.files) for artifact in artifacts)
    what = f"{run}: {len(artifacts)} artifacts, {files} files, {total / 1e6:.1f} MB"
    return _verdict(what, bad, "all as their manifests say", console)


def verify_model(model: str, *, tracking: str | None, console: Console) -> int:
    """Check a model in the registry, in storage or on disk; returns the exit code: 0 sound, 1 damaged.
    On disk the folder may be the copy that MLflow has. Raises UsageError if there is no model, or no list of files to
    compare with."""
    set_environment(environment())
    with usage_errors():
        bad = model_differences(model, tracking_uri(tracking))
    return _verdict(model, bad, "all files as they were registered", console)


def _verdict(what: str, bad: list[str], sound: str, console: Console) -> int:
    for line in bad:
        console.print(line, style="red", highlight=False, soft_wrap=True)
    console.print(f"{what}: {f'{len(bad)} damaged' if bad else sound}", highlight=False, soft_wrap=True)
    return DAMAGED if bad else SOUND


def model_differences(model: str, tracking: str | None) -> list[str]:
    """Lists the changed, missing and added files of a model, a line for each.
    Raises ValueError if there is nothing to compare with."""
    from components.runtime.tracking import registry  # MLflow takes seconds to import

    if model.startswith(REGISTRY):
        with tempfile.TemporaryDirectory() as folder:
            packed = registry.download_packed(model, Path(folder), tracking_uri=tracking)
            return differences(packed.folder, digest=packed.digest, text=packed.files)
    if not registry.is_model_folder(model):
        artifact = registry.model_artifact(model)
        return verify_files(artifact.store, artifact.files)
    packed = registry.packed_around(Path(model))
    if packed is None:
        raise ValueError(f"{model} has no {LIST} around it to be compared with: it was copied out of its registry")
    return differences(packed)


def committed(root: Store, run: str) -> tuple[list[Artifact], list[str]]:
    """Returns (artifacts of a run's finished stages, a line for each missing or broken manifest)."""
    artifacts, bad = [], []
    for stage in load_plan(root, run)["stages"]:
        store = root.join("stages", stage["name"], stage["key"])
        try:
            artifact = load_artifact(store)
        except ArtifactError as error:
            bad.append(str(error))
            continue
        if artifact is not None:
            artifacts.append(artifact)
        elif stage["state"] in ("done", "cached"):
            bad.append(f"{store.url('manifest.json')} is missing")
    return artifacts, bad


def collect_garbage(storage: str | None, *, unused: bool, delete: bool) -> None:
    """Print each unneeded folder with size and reason; with `delete`, delete the folders."""
    root = Store(storage_uri(storage))
    garbage = find_garbage(root, unused=unused, on_wait=lambda line: typer.echo(line, err=True))
    for folder in garbage:
        typer.echo(f"{folder.bytes / 1e6:10.1f} MB  {folder.path}  ({folder.reason})")
    gone = collect(root, garbage, unused=unused) if delete else garbage
    total = sum(folder.bytes for folder in gone) / 1e6
    typer.echo(f"{len(gone)} folders, {total:.1f} MB {'deleted' if delete else '(delete them with --yes)'}")
    for folder in garbage:
        if folder not in gone:
            typer.echo(f"left alone, it is needed again: {folder.path}")


def import_model(uri: str, *, stage: str | None, assignments: list[str], out: str, tokenizer: str | None = None) -> str:
    """Import weights for a stage, `RECIPE/STAGE`; returns lines about the model and a next command.
    `tokenizer` is the file of a model that reads captions itself.
    Raises UsageError for a stage that is not there, and for weights that are damaged or do not fit; StoreError."""
    set_environment(environment())
    target = None if stage is None else target_of(stage, assignments)
    with usage_errors():
        words = None if tokenizer is None else read_tokenizer(tokenizer)
        made = import_weights(read_weights(uri), target, out=Store(absolute(out)), tokenizer=words)
    kind, network, settings, module = made.bundle
    classes = f", {network['num_classes']} classes" if network.get("num_classes") else ""
    left_out = f", {made.left_out} of training or other models left out" if made.left_out else ""
    parameters = sum(parameter.numel() for parameter in module.parameters())
    alone = settings.get("role") == "base" and "latent_scale" not in settings and not network.get("text_states_dim")
    command = f"sample --model {out}" if alone else f"verify --model {out}"
    takes_images = family_of(kind).reconstructs and network.get("image_channels", 3) in (1, 3)
    command = f"reconstruct --model {out} --image photo.png" if takes_images else command
    return (
        f"{made.family}: {made.read} tensors read, 0 missing, 0 unused{left_out}; {parameters:,} parameters{classes}\n"
        f"model: {made.artifact.identity} in {out}\nnext: cascade {command}"
    )


def target_of(name: str, assignments: list[str]) -> Target:
    """The stage `RECIPE/STAGE` as a target of weights.
    Raises UsageError if the recipe trains no such model."""
    recipe, slash, stage = name.rpartition("/")
    own = load_recipe(recipe if slash else name, assignments)
    workflow = build_workflow(own)
    trained = {each.name: each.config for each in workflow.stages if isinstance(each.config, Training)}
    if not slash or stage not in trained:
        raise UsageError(f"--as {name}: name a stage, {' or '.join(f'{recipe or name}/{each}' for each in trained)}")
    parents = workflow.by_name[stage].parents
    tokenizer = trained[parents["tokenizer"].name] if "tokenizer" in parents else None
    larger = tuple(each for each in trained if each.startswith("upsampler"))
    sampling = own.sampling.by_model(larger).get(stage, {})
    grid = tokenizer.token_grid if tokenizer else None
    return Target(name, trained[stage], grid, "autoencoder" in parents, sampling)


def write_average(model: str, *, length: float, tracking: str | None, out: Path) -> str | None:
    """Write the model with an average of another length, a share of training in (0, 0.28), to `out`.
    An average of a registered model becomes a version of its name too, and its candidate: returns its address. Raises
    UsageError for a model that is not there or kept no snapshots, a length that has no average, and a folder that holds
    something."""
    from components.runtime.tracking.registry import register_average
    from components.training.results import choose_average
    from pipelines.command.loading import local_model

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"--out {out} holds something already: name a new folder")
    with usage_errors():
        with local_model(model, tracking) as folder:
            if not (folder / DESCRIPTION).is_file():
                raise UsageError(f"{model} is a whole cascade, which keeps no snapshots: give the model of one stage")
            with usage_errors(f"{model}: "):
                choose_average(folder, out, sigma_rel=length)
        uri = tracking_uri(tracking) if model.startswith(REGISTRY) else None
        if uri is None:
            return None
        made = register_average(model, out, sigma_rel=length, tracking_uri=uri)
    return f"{REGISTRY}{made.name}/{made.version}"


def promote_version(model: str, *, back: bool, tracking: str | None) -> str:
    """Move the champion's alias to another version by hand; returns lines about it and the way back.
    Raises UsageError if there is no such version."""
    from components.runtime.tracking.promotion import promote_by_hand

    set_environment(environment())
    uri = tracking_uri(tracking)
    if uri is None:
        raise UsageError(f"{model} is in a registry: name it with --tracking")
    with usage_errors():
        name, version, before = promote_by_hand(model, tracking_uri=uri, back=back)
    again = "" if before in (None, version) else f"; to take it back: cascade promote {name}@{before}"
    return f"{REGISTRY}{name}@champion is version {version}{again}"
