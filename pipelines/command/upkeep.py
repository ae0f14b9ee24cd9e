"""Runs and models in storage and registry: `cascade verify`, `import`, `export` and `ema`."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from components.configuration.optimization import Training
from components.configuration.sampling import SamplingConfig
from components.configuration.usage import UsageError, usage_errors
from components.models.bundle import DESCRIPTION
from components.models.file_list import LIST, differences
from components.runtime.storage.artifact import Artifact, ArtifactError, load_artifact, verify_files
from components.runtime.storage.connection import shown
from components.runtime.storage.scratch import scratch_folder
from components.runtime.storage.store import Store
from components.runtime.tracking.event_log import place_of
from components.runtime.tracking.names import REGISTRY, environment
from components.weights.importing import Target
from pipelines.engine.code_seen import made_by
from pipelines.engine.display import say
from pipelines.engine.driver import UNREGISTERED
from pipelines.engine.recorder import EXPERIMENT
from pipelines.engine.run_report import load_plan, newest_run
from pipelines.engine.session import set_environment
from pipelines.planning.profiles import storage_uri, tracking_uri
from pipelines.recipes.catalog import load_recipe
from pipelines.workflows import build_workflow

SOUND, DAMAGED = 0, 1
WHOLE = "cascade"  # the stage that composes all parts
REGISTER_SECONDS = 24 * 3600.0  # for models of any size


def verify_run(run: str | None, *, storage: str | None, console: Console) -> int:
    """Check the artifacts of a run, None: the newest; returns the exit code: 0 sound, 1 damaged.
    Raises UsageError if there is no such run, StoreError if storage can't be reached."""
    root, artifacts, bad = Store(storage_uri(storage)), list[Artifact](), list[str]()
    run = run or newest_run(root)
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
    total = sum(entry.bytes for artifact in artifacts for entry in artifact.files)
    columns = [TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()]
    with Progress(*columns, TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task(run, total=total)
        for artifact in artifacts:
            bar.update(task, description=artifact.stage)
            bad += verify_files(artifact.store, artifact.files, on_file=lambda entry: bar.advance(task, entry.bytes))
    files = sum(len(artifact.files) for artifact in artifacts)
    what = f"{run}: {len(artifacts)} artifacts, {files} files, {total / 1e6:.1f} MB"
    return verdict(what, bad, "all as their manifests say", console)


def register_run(run: str | None, *, storage: str | None, tracking: str | None, console: Console) -> int:
    """Send MLflow the missing part of a run, None: the newest; returns the exit code: 0 sent, 3 not all.
    Raises UsageError if there is no such run or no MLflow, StoreError if storage can't be reached."""
    root, uri = Store(storage_uri(storage)), tracking_uri(tracking)
    run = run or newest_run(root)
    load_plan(root, run)
    if uri is None:
        raise UsageError(f"{run}: name the MLflow that is to have it with --tracking")
    from components.runtime.tracking import registry  # MLflow takes seconds to import
    from components.runtime.tracking.runs import run_statuses
    from components.runtime.tracking.tracker import Tracker

    place, lacking = place_of(root, run), ""
    if not (waiting := place.folders()):
        set_environment(environment())
        with usage_errors(), registry.in_one_line(f"{shown(uri)} can't be asked for {run}"):
            known = run_statuses(uri, experiment=EXPERIMENT)
        if run not in known:
            lacks = f"nothing of {run} waits in storage, and {shown(uri)} has no run of that name"
            raise UsageError(f"{lacks}: the run's own command sends it, and trains nothing again")
    for name in waiting:
        with scratch_folder("spool") as spool:
            tracker = Tracker(uri, experiment=EXPERIMENT, spool=spool, copy=place.join(name))
            for line in tracker.close("KILLED", timeout_seconds=REGISTER_SECONDS):  # an ended run stays so
                say(console, f"warning: {line}", "yellow")
            decided = tracker.delivery.promotions.get(run) if tracker.delivery else None
            for line in decided.lines() if decided else ():
                say(console, line)
            lacking = tracker.undelivered or lacking
    say(console, f"{run}: MLflow {'still lacks a part: the same command sends it' if lacking else 'has everything'}")
    return UNREGISTERED if lacking else SOUND


def verdict(what: str, bad: Sequence[str], sound: str, console: Console) -> int:
    """Print what is damaged, or that all is `sound`; returns the exit code."""
    for line in bad:
        console.print(line, style="red", highlight=False, soft_wrap=True)
    console.print(f"{what}: {f'{len(bad)} damaged' if bad else sound}", highlight=False, soft_wrap=True)
    return DAMAGED if bad else SOUND


def model_differences(model: str, tracking: str | None) -> list[str]:
    """Lists changed, missing and added files of a model in registry, storage or on disk, a line for each.
    Raises ValueError if there is no model, or no list of its files."""
    from components.runtime.tracking import registry

    if model.startswith(REGISTRY):
        with scratch_folder("model") as folder:
            packed = registry.download_packed(model, folder, tracking_uri=tracking)
            return differences(packed.folder, digest=packed.digest, text=packed.files)
    if not registry.is_model_folder(model):
        artifact = registry.model_artifact(model)
        return verify_files(artifact.store, artifact.files)
    packed = registry.packed_around(Path(model))
    if packed is None:
        raise ValueError(f"{model} has no {LIST} around it to be compared with: it was copied out of its registry")
    return differences(packed)


def targets_of(name: str, assignments: list[str]) -> tuple[dict[str, Target], SamplingConfig | None]:
    """The stage `RECIPE/STAGE` as a target of weights, or parts of `RECIPE/cascade` and their sampling.
    Raises UsageError if the recipe trains no such model, or parts of the cascade are not in one file."""
    recipe, slash, stage = name.rpartition("/")
    own = load_recipe(recipe if slash else name, assignments)
    workflow = build_workflow(own)
    trained = {each.name: each.config for each in workflow.stages if isinstance(each.config, Training)}
    parts = {stage: stage}
    if slash and stage == WHOLE and stage in workflow.by_name:
        parts = {part: parent.name for part, parent in workflow.by_name[stage].parents.items()}
        if others := [part for part, each in parts.items() if each not in trained or "." in part]:
            raise UsageError(f"--as {name}: no file holds {', '.join(others)} too: import its stages one by one")
    elif not slash or stage not in trained:
        raise UsageError(f"--as {name}: name a stage, {' or '.join(f'{recipe or name}/{each}' for each in trained)}")
    larger = tuple(each for each in trained if each.startswith("upsampler"))
    sampling = own.sampling.by_model(larger)

    def target(stage: str) -> Target:
        parents = workflow.by_name[stage].parents
        seen = parents.get("condition")  # tokens of another image, by a tokenizer of its own
        makers = (parents.get("tokenizer"), None if seen is None else seen.parents["tokenizer"])
        grid, condition = (None if maker is None else trained[maker.name].token_grid for maker in makers)
        about = (grid, "autoencoder" in parents, sampling.get(stage, {}))
        return Target(f"{recipe}/{stage}", trained[stage], *about, condition)

    return {part: target(each) for part, each in parts.items()}, own.sampling if stage == WHOLE else None


def write_average(model: str, *, length: float, tracking: str | None, out: Path) -> str | None:
    """Write the model with an average of another length, a share of training in (0, 0.28), to `out`.
    Returns the address of a registered model's new version. Raises UsageError for a model that is not there or kept no
    snapshots, a length that has no average, and a folder that holds something."""
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


def known_of(model: str, tracking: str | None) -> str:
    """Markdown about a model, of its registry or of its manifest; empty for a bare folder.
    Raises ValueError if the registry can't be reached."""
    from components.runtime.tracking import registry

    if model.startswith(REGISTRY):
        return registry.description_of(model, tracking_uri=tracking_uri(tracking))
    if registry.is_model_folder(model):
        return ""
    artifact = registry.model_artifact(model)
    lines = [f"Model `{artifact.identity}`, made by {made_by(artifact.provenance) or 'code that is not known'}."]
    if origin := artifact.provenance.get("origin"):
        license_ = origin.get("license", "not stated")
        lines.append(f"Weights of the {origin['family']}, sha256 `{origin['sha256']}`; their license: {license_}.")
    return "\n\n".join(lines)
