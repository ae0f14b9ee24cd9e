"""`cascade verify`: every artifact of a run against its manifest, with a progress bar."""

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from components.storage.artifact import Artifact, ArtifactError, load_artifact, verify_artifact
from components.storage.store import Store
from pipelines.profiles import storage_uri
from pipelines.run_report import load_plan, newest_run

SOUND, DAMAGED = 0, 1


def verify_run(run: str | None, *, storage: str | None, console: Console) -> int:
    """Check the artifacts of a run, the newest if `run` is None. Returns the exit code: 0 sound, 1 damaged.

    Raises UsageError if there is no such run, StoreError if storage can't be reached.
    """
    root = Store(storage_uri(storage))
    run = run or newest_run(root)
    artifacts, bad = committed(root, run)
    total = sum(entry.bytes for artifact in artifacts for entry in artifact.files)
    columns = [TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()]
    with Progress(*columns, TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task(run, total=total)
        for artifact in artifacts:
            bar.update(task, description=artifact.stage)
            bad += verify_artifact(artifact, on_file=lambda entry: bar.advance(task, entry.bytes))
    for line in bad:
        console.print(line, style="red", highlight=False, soft_wrap=True)
    files = sum(len(artifact.files) for artifact in artifacts)
    verdict = f"{len(bad)} damaged" if bad else "all as their manifests say"
    console.print(f"{run}: {len(artifacts)} artifacts, {files} files, {total / 1e6:.1f} MB: {verdict}", highlight=False)
    return DAMAGED if bad else SOUND


def committed(root: Store, run: str) -> tuple[list[Artifact], list[str]]:
    """(artifacts of a run's finished stages, a line for each whose manifest is missing or can't be read)."""
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
