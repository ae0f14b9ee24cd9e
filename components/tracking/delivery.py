"""The journal's events, one function each, as calls of MLflow. Delivering an event twice changes nothing."""

import json
import tempfile
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import mlflow
import PIL.Image
from mlflow.entities import Metric, Param
from mlflow.tracking import MlflowClient
from mlflow.tracking.multimedia import compress_image_size
from mlflow.utils.mlflow_tags import MLFLOW_GIT_COMMIT, MLFLOW_LOGGED_IMAGES, MLFLOW_RUN_NOTE, MLFLOW_SOURCE_NAME

from components.storage.artifact import Artifact
from components.tracking import registry
from components.tracking.journal import Event, Journal
from components.tracking.lineage import record_inputs, record_output
from components.tracking.missing import what_is_missing
from components.tracking.runs import (
    CACHED,
    KEY,
    MADE_BY,
    RUN,
    STAGE,
    WORKFLOW,
    TrackedRun,
    artifact_location,
    as_tracked,
    find_maker,
    find_or_create_experiment,
    find_run,
    image_name,
    take_up,
)
from components.tracking.system import PREFIX

MAX_METRICS, MAX_PARAMS, MAX_PARAM_LENGTH, MAX_TAG_LENGTH = 1000, 100, 6000, 5000  # MLflow's limits of one call
MODEL_TAG = "cascade.model."  # of the parent run: registered model -> version


class Delivery:
    """One connection to MLflow and the runs known to it."""

    def __init__(self, tracking_uri: str, *, experiment: str) -> None:
        """Connect. Raises whatever MLflow raises while it is away."""
        mlflow.set_tracking_uri(tracking_uri)  # a registry in a SQLite file looks for its models there
        self.client = MlflowClient(tracking_uri)
        location = artifact_location(tracking_uri, experiment)
        self.experiment_id = find_or_create_experiment(self.client, experiment, artifact_location=location)
        self.runs: dict[tuple[str, str], TrackedRun] = {}
        self.warnings: list[str] = []  # for the user

    def deliver(self, event: Event, journal: Journal) -> None:
        """Send one event of `journal`."""
        getattr(self, f"_{event['event']}")(event, journal)

    def _start_run(self, event: Event, journal: Journal) -> None:
        git_commit = event["tags"].get("git_commit", "")
        tags = {f"cascade.{name}": value for name, value in event["tags"].items()}
        tags |= {RUN: event["run"], KEY: WORKFLOW, MLFLOW_GIT_COMMIT: git_commit, MLFLOW_SOURCE_NAME: "cascade"}
        tracked = take_up(self.client, self.experiment_id, name=event["run"], started=event["time"], tags=tags)
        self.runs[event["run"], ""] = tracked
        self._log_params(tracked, event["parameters"])
        self.client.log_text(tracked.run_id, event["recipe_yaml"], "recipe.yaml")

    def _start_stage(self, event: Event, journal: Journal) -> None:
        tracked = self._take_up_stage(event, {CACHED: "false"})
        self._log_params(tracked, event["config"])
        self._send(tracked, event.get("points", []))
        inputs = [as_artifact(document) for document in event["inputs"]]
        self._record_inputs(tracked.run_id, inputs)

    def _stage_cached(self, event: Event, journal: Journal) -> None:
        run, artifact = event["run"], as_artifact(event["artifact"])
        existing = find_run(self.client, self.experiment_id, run=run, key=event["key"])
        made_here = artifact.provenance.get("run") == run  # though MLflow may have been away, and the journal is lost
        if existing is not None:  # it stays the run that made it
            tracked = self.runs[run, event["key"]] = as_tracked(self.client, existing)
        elif made_here:
            tracked = self._take_up_stage(event, {CACHED: "false"})
            self._log_params(tracked, artifact.provenance["config"])
        else:
            tracked = self._show_cached(event, artifact)
        if made_here:
            self._send(tracked, event.get("points", []))
            self._say_what_is_missing(event, tracked, artifact)
        self._register(tracked.run_id, event, artifact)
        self.client.set_terminated(tracked.run_id, "FINISHED", end_time=_end_of(existing) or event["time"])

    def _show_cached(self, event: Event, artifact: Artifact) -> TrackedRun:
        maker = find_maker(self.client, self.experiment_id, key=event["key"])
        tracked = self._take_up_stage(event, {CACHED: "true"} | ({MADE_BY: maker.info.run_id} if maker else {}))
        self.client.set_tag(tracked.run_id, MLFLOW_RUN_NOTE, self._cached_note(event, maker, artifact))
        return tracked

    def _cached_note(self, event: Event, maker: Any, artifact: Artifact) -> str:
        made_by = "by a run that this MLflow does not know"
        if maker is not None:
            link = f"#/experiments/{self.experiment_id}/runs/{maker.info.run_id}"
            made_by = f"by [{maker.data.tags.get(RUN, maker.info.run_id)}]({link})"
        return f"Cached: `{event['stage']}` with this key was made {made_by}.\n\nArtifact: `{artifact.root}`"

    def _metrics(self, event: Event, journal: Journal) -> None:
        self._send(self._tracked(event), event["points"])

    def _send(self, tracked: TrackedRun, named: list[list[Any]]) -> None:
        """Those of the points [name, step, value, time] that MLflow lacks."""
        points = [
            Metric(name, value, time, self._step(tracked, name, step, time))
            for name, step, value, time in named
            if step not in tracked.steps.get(name, ())
        ]
        for start in range(0, len(points), MAX_METRICS):
            batch = points[start : start + MAX_METRICS]
            self.client.log_batch(tracked.run_id, metrics=batch)
            for point in batch:
                if not point.key.startswith(PREFIX):
                    tracked.steps.setdefault(point.key, set()).add(point.step)

    @staticmethod
    def _step(tracked: TrackedRun, name: str, step: int, time: int) -> int:
        """System metrics are drawn by the seconds since their run began."""
        return max(0, (time - tracked.started) // 1000) if name.startswith(PREFIX) else step

    def _image(self, event: Event, journal: Journal) -> None:
        tracked, place = self._tracked(event), (event["name"], event["step"])
        if place in tracked.images:
            return
        token = uuid.uuid5(uuid.NAMESPACE_URL, json.dumps([*place, event["time"]]))
        name = image_name(*place, time_ms=event["time"], token=str(token))
        with tempfile.TemporaryDirectory() as folder, PIL.Image.open(journal.blob(event["blob"])) as image:
            image.save(Path(folder) / f"{name}.png")
            compress_image_size(image).save(Path(folder) / f"{name}+compressed.webp")
            self.client.log_artifacts(tracked.run_id, folder, "images")
        self.client.set_tag(tracked.run_id, MLFLOW_LOGGED_IMAGES, True)
        tracked.images.add(place)

    def _text(self, event: Event, journal: Journal) -> None:
        self.client.log_text(self._tracked(event).run_id, journal.blob(event["blob"]).read_text(), event["name"])

    def _end_stage(self, event: Event, journal: Journal) -> None:
        tracked = self._tracked(event)
        if event["error"]:
            self.client.set_tag(tracked.run_id, "cascade.error", event["error"][:MAX_TAG_LENGTH])
        if event["artifact"] is not None:
            artifact = as_artifact(event["artifact"])
            self.client.set_tag(tracked.run_id, "cascade.artifact", artifact.root)
            self._say_what_is_missing(event, tracked, artifact)
            self._register(tracked.run_id, event, artifact)
        self.client.set_terminated(tracked.run_id, event["status"], end_time=event["time"])

    def _say_what_is_missing(self, event: Event, tracked: TrackedRun, artifact: Artifact) -> None:
        if missing := what_is_missing(artifact, tracked):
            why = "they were in the journal of a driver that is gone, or has yet to send them"
            self.warnings.append(f"{event['stage']}: MLflow lacks {missing}: {why}")

    def _end_run(self, event: Event, journal: Journal) -> None:
        run_id = self._tracked(event).run_id
        if event["status"] == "FINISHED":
            tags = self.client.get_run(run_id).data.tags
            for tag in sorted(tag for tag in tags if tag.startswith(MODEL_TAG)):
                registry.promote(self.client, tag.removeprefix(MODEL_TAG), tags[tag])
        self.client.set_terminated(run_id, event["status"], end_time=event["time"])

    def _register(self, run_id: str, event: Event, artifact: Artifact) -> None:
        """Register a model artifact and remember its version in the parent run, for when that ends well."""
        if artifact.kind != "model":
            return
        parent = self._tracked(event | {"key": ""}).run_id
        models = event.get("models") or event["recipe"]  # a journal of before has the recipe's name alone
        registered = registry.register_artifact(
            self.client, artifact, models=models, experiment_id=self.experiment_id, run_id=run_id
        )
        record_output(self.client, run_id, model_id=registered.model_id)
        self.client.set_tag(parent, MODEL_TAG + registered.name, registered.version)

    def _record_inputs(self, run_id: str, inputs: list[Artifact]) -> None:
        data = [artifact for artifact in inputs if artifact.kind != "model"]
        keys = [artifact.key for artifact in inputs if artifact.kind == "model"]
        models = [registry.find_logged_model(self.client, self.experiment_id, key=key) for key in keys]
        record_inputs(self.client, run_id, data=data, model_ids=[model.model_id for model in models if model])

    def _take_up_stage(self, event: Event, tags: dict[str, str]) -> TrackedRun:
        parent = self._tracked(event | {"key": ""})
        tracked = take_up(
            self.client,
            self.experiment_id,
            name=event["stage"],
            started=event["time"],
            tags={RUN: event["run"], STAGE: event["stage"], KEY: event["key"], **tags},
            parent=parent.run_id,
        )
        self.runs[event["run"], event["key"]] = tracked
        return tracked

    def _tracked(self, event: Event) -> TrackedRun:
        place = (event["run"], event["key"])
        if place not in self.runs:  # begun by another process
            run = find_run(self.client, self.experiment_id, run=event["run"], key=event["key"])
            if run is None:
                raise LookupError(f"MLflow has no run {event['run']} {event['key']}; was it deleted?")
            self.runs[place] = as_tracked(self.client, run)
        return self.runs[place]

    def _log_params(self, tracked: TrackedRun, parameters: dict[str, Any]) -> None:
        """Parameters never change in MLflow: a run that is taken up keeps those it has."""
        known = {} if tracked.new else self.client.get_run(tracked.run_id).data.params
        new = [Param(name, value) for name, value in flatten(parameters).items() if name not in known]
        for start in range(0, len(new), MAX_PARAMS):
            self.client.log_batch(tracked.run_id, params=new[start : start + MAX_PARAMS])


def coalesce(events: Iterable[Event]) -> list[Event]:
    """Join the metrics of each run that no other event of that run stands between, in the order of the rest."""
    joined: list[Event] = []
    open_: dict[tuple[str, str], Event] = {}
    for event in events:
        place = (event["run"], event["key"])
        if event["event"] != "metrics":
            open_.pop(place, None)
            joined.append(event)
        elif place in open_:
            open_[place]["points"].extend(event["points"])
        else:
            open_[place] = event | {"points": list(event["points"])}
            joined.append(open_[place])
    return joined


def flatten(parameters: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested parameters as MLflow's flat ones: `base.betas` -> "[0.9, 0.99]"."""
    flat: dict[str, str] = {}
    for name, value in parameters.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value)
            flat[f"{prefix}{name}"] = text[:MAX_PARAM_LENGTH]
    return flat


def as_document(artifact: Artifact) -> dict[str, Any]:
    """An artifact as JSON, with the address that its manifest leaves out."""
    return {"root": artifact.root, "manifest": artifact.model_dump(mode="json")}


def as_artifact(document: dict[str, Any]) -> Artifact:
    return Artifact(**document["manifest"], root=document["root"])


def _end_of(run: Any) -> int | None:
    return None if run is None or run.info.status != "FINISHED" else run.info.end_time
