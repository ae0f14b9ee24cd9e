"""Runs in MLflow, found by tags before creation: a retry goes on in its earlier run.

One parent run for each workflow run (tag `cascade.run`), one child for each stage key in it (tag `cascade.stage_key`).
"""

import json
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from mlflow.entities import Dataset, DatasetInput, InputTag, LoggedModelInput, Run, RunStatus, ViewType
from mlflow.tracking import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT, MLFLOW_PARENT_RUN_ID

from components.runtime.storage.artifact import Artifact
from components.runtime.storage.model_table import column_of
from components.runtime.tracking.names import KEY, RUN, SQLITE, SYSTEM, WORKFLOW

PREVIEW = "preview.png"
SCHEDULED = {"points": "log_every", "images": "sample_every"}  # what a training sends, at multiples of which field
IMAGE = re.compile(r"(.+?)\+step\+([0-9]+)\+")  # the start of an image's file name: its name and step
DIGEST_CHARACTERS = 36  # MLflow's limit
COUNTS = ("samples", "train_samples", "holdout_samples", "shards")  # of metadata, if any
SETTLE_SECONDS = 0.5  # two drivers that make one run at the same moment see each other within it


@dataclass
class TrackedRun:
    """A run with the points and images in MLflow, so that a repeated step is not drawn twice."""

    run_id: str
    started: int  # milliseconds since 1970
    steps: dict[str, set[int]] = field(default_factory=dict)  # name of the metric -> steps that have arrived
    images: set[tuple[str, int]] = field(default_factory=set)  # (name, step)


class Runs:
    """Runs of an experiment, which is created or restored; a run is tracked as soon as it is asked for."""

    def __init__(self, client: MlflowClient, tracking_uri: str, experiment: str) -> None:
        self.client = client
        self.tracked: dict[tuple[str, str], TrackedRun] = {}  # by run and stage key; "": of the run
        if existing := client.get_experiment_by_name(experiment):
            self.experiment_id = existing.experiment_id
            if existing.lifecycle_stage == "deleted":
                client.restore_experiment(self.experiment_id)
            return
        location = None  # a server has its own
        if tracking_uri.startswith(SQLITE):
            folder = Path(tracking_uri.removeprefix(SQLITE)).resolve().parent
            location = (folder / "mlflow-files" / experiment).as_uri()
        self.experiment_id = client.create_experiment(experiment, artifact_location=location)

    def find(self, run: str, key: str = "") -> Run | None:
        """The parent run of a workflow run, or with `key` the child of a stage key."""
        runs = search(self.client, self.experiment_id, {RUN: run, KEY: key or WORKFLOW})
        return min(runs, key=lambda r: r.info.run_id, default=None)

    def take_up(self, run: str, key: str = "", *, name: str, started: int, tags: dict[str, str]) -> TrackedRun:
        """Find the run, or with `key` the child of a stage, and set it running again, or make it."""
        existing = self.find(run, key)
        if existing is None:
            tags = tags | {RUN: run, KEY: key or WORKFLOW}
            tags |= {MLFLOW_PARENT_RUN_ID: self.get(run).run_id} if key else {}
            made = self.client.create_run(self.experiment_id, start_time=started, tags=tags, run_name=name)
            time.sleep(SETTLE_SECONDS)
            existing = self.find(run, key)
            if existing is None or existing.info.run_id == made.info.run_id:
                self.tracked[run, key] = TrackedRun(made.info.run_id, started)
                return self.tracked[run, key]
            self.client.delete_run(made.info.run_id)  # another driver was faster
        elif existing.info.status != "RUNNING":
            self.client.update_run(existing.info.run_id, status=RunStatus.to_string(RunStatus.RUNNING))
        for tag, value in ({} if key else tags).items():  # what it is told now, as after its images were moved
            if existing.data.tags.get(tag) != value:
                self.client.set_tag(existing.info.run_id, tag, value)
        return self.track(run, key, existing)

    def get(self, run: str, key: str = "") -> TrackedRun:
        """The parent run, or with `key` the child of a stage. Raises LookupError if MLflow has no such run."""
        if (run, key) not in self.tracked:  # begun by another process
            existing = self.find(run, key)
            if existing is None:
                raise LookupError(f"MLflow has no run {run} {key}; was it deleted?")
            self.track(run, key, existing)
        return self.tracked[run, key]

    def track(self, run: str, key: str, existing: Run) -> TrackedRun:
        """Track a run of another process, with the steps and images in MLflow."""
        run_id = existing.info.run_id
        names = [name for name in existing.data.metrics if not name.startswith(SYSTEM)]
        steps = {name: {point.step for point in self.client.get_metric_history(run_id, name)} for name in names}
        files = [IMAGE.match(Path(file.path).name) for file in self.client.list_artifacts(run_id, "images")]
        images = {(parts[1].replace("~", "/"), int(parts[2])) for parts in files if parts}
        self.tracked[run, key] = TrackedRun(run_id, existing.info.start_time, steps, images)
        return self.tracked[run, key]


def search(client: MlflowClient, experiment_id: str, tags: dict[str, str]) -> list[Run]:
    """Runs of an experiment with the tags, without deleted runs."""
    conditions = " and ".join(f"tags.`{name}` = '{value}'" for name, value in tags.items())
    return list(client.search_runs([experiment_id], conditions, run_view_type=ViewType.ACTIVE_ONLY))


def run_statuses(tracking_uri: str, *, experiment: str) -> dict[str, str]:
    """Names of the workflow runs -> status, such as FINISHED. Raises MLflow's errors while MLflow is away."""
    if is_new(tracking_uri):
        return {}
    client = MlflowClient(tracking_uri)
    existing = client.get_experiment_by_name(experiment)
    runs = search(client, existing.experiment_id, {KEY: WORKFLOW}) if existing else []
    return {run.data.tags[RUN]: run.info.status for run in runs}


def is_new(tracking_uri: str) -> bool:
    """True for a missing SQLite file: a client would spend seconds on making tables."""
    file = tracking_uri.removeprefix(SQLITE)
    return file != tracking_uri and not Path(file).exists()


def what_is_missing(artifact: Artifact, tracked: TrackedRun) -> str:
    """Names steps with points or images of the recipe missing in MLflow; empty without such steps."""
    config = artifact.provenance.get("config", {}).get("optimization")
    if config is None:
        return ""  # no training
    total, shown = config["total_steps"], {step for _, step in tracked.images}
    steps = {kind: {*range(config[every], total + 1, config[every]), total} for kind, every in SCHEDULED.items()}
    missing = {"points": steps["points"] - set().union(*tracked.steps.values())}
    if shown or PREVIEW in artifact.names():  # not every model makes images
        missing["images"] = steps["images"] - shown
    return " and ".join(f"{kind} of {in_words(steps)}" for kind, steps in missing.items() if steps)


def in_words(steps: Iterable[int]) -> str:
    first, *rest = sorted(steps)
    return f"{1 + len(rest)} steps from {first} to {rest[-1]}" if rest else f"step {first}"


def record_inputs(client: MlflowClient, run_id: str, *, data: list[Artifact], model_ids: list[str]) -> None:
    """Links a run to input data sets and models. Idempotent."""
    present = {model.model_id for model in client.get_run(run_id).inputs.model_inputs or []}
    new = [LoggedModelInput(model_id) for model_id in model_ids if model_id not in present]
    context = [InputTag(MLFLOW_DATASET_CONTEXT, "training")]
    datasets = [DatasetInput(dataset_of(artifact), tags=context) for artifact in data]
    if datasets or new:
        client.log_inputs(run_id, datasets=datasets, models=new)


def dataset_of(artifact: Artifact) -> Dataset:
    """Describes an artifact as a data set of MLflow: stage as name, key as digest, address as source."""
    profile = {"bytes": int(column_of(artifact.files, "bytes").sum()), "files": len(artifact.files)}
    profile |= {name: artifact.metadata[name] for name in COUNTS if name in artifact.metadata}
    scheme = urlsplit(artifact.root).scheme
    return Dataset(
        name=artifact.stage,
        digest=artifact.key[:DIGEST_CHARACTERS],
        source_type="local" if scheme in ("", "file") else scheme,
        source=json.dumps({"uri": artifact.root}),
        profile=json.dumps(profile),
    )
