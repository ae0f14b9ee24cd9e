"""Runs in MLflow, found by tags before creation: a retry goes on in its earlier run.

One parent run for each workflow run (tag `cascade.run`), one child for each stage key in it (tag `cascade.stage_key`).
Each holds its points and images, the data sets and models that it read, and the models that it made.
"""

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from mlflow.entities import (
    Dataset,
    DatasetInput,
    InputTag,
    LoggedModelInput,
    LoggedModelOutput,
    Run,
    RunStatus,
    ViewType,
)
from mlflow.tracking import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT, MLFLOW_PARENT_RUN_ID

from components.runtime.storage.artifact import Artifact
from components.runtime.tracking.names import CACHED, KEY, RUN, SYSTEM, WORKFLOW

SQLITE = "sqlite:///"
PREVIEW = "preview.png"
DIGEST_CHARACTERS = 36  # MLflow's limit
COUNTS = ("samples", "train_samples", "holdout_samples", "shards")  # of an artifact's metadata, where it has them
SETTLE_SECONDS = 0.5  # two drivers that make one run at the same moment see each other within it


@dataclass
class TrackedRun:
    """A run with the points and images in MLflow, so that a repeated step is not drawn twice."""

    run_id: str
    started: int  # milliseconds since 1970
    new: bool  # made just now, not found
    steps: dict[str, set[int]] = field(default_factory=dict)  # name of the metric -> steps that have arrived
    images: set[tuple[str, int]] = field(default_factory=set)  # (name, step)


def find_or_create_experiment(client: MlflowClient, name: str, *, artifact_location: str | None) -> str:
    """The id of the experiment `name`; a deleted experiment is restored."""
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        return client.create_experiment(name, artifact_location=artifact_location)
    if experiment.lifecycle_stage == "deleted":
        client.restore_experiment(experiment.experiment_id)
    return experiment.experiment_id


def artifact_location(tracking_uri: str, experiment: str) -> str | None:
    """Folder of an experiment's files beside a SQLite file; None for a server with its own."""
    if not tracking_uri.startswith(SQLITE):
        return None
    folder = Path(tracking_uri.removeprefix(SQLITE)).resolve().parent
    return (folder / "mlflow-files" / experiment).as_uri()


def find_run(client: MlflowClient, experiment_id: str, *, run: str, key: str = "") -> Run | None:
    """The parent run of a workflow run, or with `key` the child of a stage key."""
    runs = _search(client, experiment_id, {RUN: run, KEY: key or WORKFLOW})
    return min(runs, key=lambda r: r.info.run_id) if runs else None


def finished_runs(tracking_uri: str, *, experiment: str) -> set[str]:
    """Names of the workflow runs that ended well. Raises MLflow's errors while MLflow is away."""
    if is_new(tracking_uri):
        return set()
    client = MlflowClient(tracking_uri)
    existing = client.get_experiment_by_name(experiment)
    runs = _search(client, existing.experiment_id, {KEY: WORKFLOW}) if existing else []
    return {run.data.tags[RUN] for run in runs if run.info.status == "FINISHED"}


def is_new(tracking_uri: str) -> bool:
    """True for a missing SQLite file: a client would spend seconds on making tables."""
    file = tracking_uri.removeprefix(SQLITE)
    return file != tracking_uri and not Path(file).exists()


def find_maker(client: MlflowClient, experiment_id: str, *, key: str) -> Run | None:
    """The run that made a stage key's artifact: the last run that finished without a cache."""
    runs = [r for r in _search(client, experiment_id, {KEY: key, CACHED: "false"}) if r.info.status == "FINISHED"]
    return max(runs, key=lambda r: r.info.end_time or 0) if runs else None


def take_up(
    client: MlflowClient,
    experiment_id: str,
    *,
    name: str,
    started: int,
    tags: dict[str, str],
    parent: str | None = None,
) -> TrackedRun:
    """Find the run with the tags (RUN and KEY count) and set the run running again, or make a run."""
    run = find_run(client, experiment_id, run=tags[RUN], key=tags[KEY])
    if run is None:
        tags = tags | ({MLFLOW_PARENT_RUN_ID: parent} if parent else {})
        return _create(client, experiment_id, name=name, started=started, tags=tags)
    if run.info.status != "RUNNING":
        client.update_run(run.info.run_id, status=RunStatus.to_string(RunStatus.RUNNING))
    return as_tracked(client, run)


def as_tracked(client: MlflowClient, run: Run) -> TrackedRun:
    """A run of another process, with the steps and images in MLflow."""
    run_id = run.info.run_id
    names = [name for name in run.data.metrics if not name.startswith(SYSTEM)]
    steps = {name: {point.step for point in client.get_metric_history(run_id, name)} for name in names}
    images = {place for file in client.list_artifacts(run_id, "images") if (place := _image_place(file.path))}
    return TrackedRun(run_id, run.info.start_time, False, steps, images)


def image_name(name: str, step: int, *, time_ms: int, token: str) -> str:
    """A file name, without suffix, for step `step` of the image `name` on MLflow's page."""
    return f"{name.replace('/', '~')}+step+{step}+timestamp+{time_ms}+{token}"


def _image_place(path: str) -> tuple[str, int] | None:
    name, _, rest = Path(path).name.partition("+step+")
    step = rest.partition("+")[0]
    return (name.replace("~", "/"), int(step)) if step.isdecimal() else None


def _create(client: MlflowClient, experiment_id: str, *, name: str, started: int, tags: dict[str, str]) -> TrackedRun:
    created = client.create_run(experiment_id, start_time=started, tags=tags, run_name=name)
    time.sleep(SETTLE_SECONDS)
    first = find_run(client, experiment_id, run=tags[RUN], key=tags[KEY])
    if first is None or first.info.run_id == created.info.run_id:
        return TrackedRun(created.info.run_id, started, True)
    client.delete_run(created.info.run_id)  # another driver was faster
    return as_tracked(client, first)


def _search(client: MlflowClient, experiment_id: str, tags: dict[str, str]) -> list[Run]:
    wanted = " and ".join(f"tags.`{name}` = '{value}'" for name, value in tags.items())
    return list(client.search_runs([experiment_id], wanted, run_view_type=ViewType.ACTIVE_ONLY))


def what_is_missing(artifact: Artifact, tracked: TrackedRun) -> str:
    """Names steps with points or images of the recipe missing in MLflow; empty without such steps.

    They were in a journal that was lost with its machine.
    """
    config = artifact.provenance.get("config", {}).get("optimization")
    if config is None:
        return ""  # no training
    total = config["total_steps"]
    points = scheduled(config["log_every"], total) - set().union(*tracked.steps.values())
    shown = {step for _, step in tracked.images}
    shows = bool(shown) or PREVIEW in artifact.names()  # not every model makes images
    images = scheduled(config["sample_every"], total) - shown if shows else set()
    missing = {"points": points, "images": images}
    return " and ".join(f"{kind} of {in_words(steps)}" for kind, steps in missing.items() if steps)


def scheduled(every: int, total: int) -> set[int]:
    """Multiples of `every` up to `total`, and `total`."""
    return {*range(every, total + 1, every), total}


def in_words(steps: Iterable[int]) -> str:
    first, *rest = sorted(steps)
    return f"{1 + len(rest)} steps from {first} to {rest[-1]}" if rest else f"step {first}"


def dataset_of(artifact: Artifact) -> Dataset:
    """Describes an artifact as a data set of MLflow: stage as name, key as digest, address as source."""
    profile = {"bytes": sum(entry.bytes for entry in artifact.files), "files": len(artifact.files)}
    profile |= {name: artifact.metadata[name] for name in COUNTS if name in artifact.metadata}
    scheme = urlsplit(artifact.root).scheme
    return Dataset(
        name=artifact.stage,
        digest=artifact.key[:DIGEST_CHARACTERS],
        source_type="local" if scheme in ("", "file") else scheme,
        source=json.dumps({"uri": artifact.root}),
        profile=json.dumps(profile),
    )


def record_inputs(client: MlflowClient, run_id: str, *, data: list[Artifact], model_ids: list[str]) -> None:
    """Links a run to input data sets and models. Idempotent."""
    present = client.get_run(run_id).inputs.model_inputs or []
    new = [LoggedModelInput(id_) for id_ in model_ids if id_ not in {model.model_id for model in present}]
    context = [InputTag(MLFLOW_DATASET_CONTEXT, "training")]
    datasets = [DatasetInput(dataset_of(artifact), tags=context) for artifact in data]
    if datasets or new:
        client.log_inputs(run_id, datasets=datasets, models=new)


def record_output(client: MlflowClient, run_id: str, *, model_id: str) -> None:
    """Links a run to an output model. Idempotent."""
    outputs = client.get_run(run_id).outputs
    if model_id not in {model.model_id for model in (outputs.model_outputs if outputs else [])}:
        client.log_outputs(run_id, [LoggedModelOutput(model_id, step=0)])
