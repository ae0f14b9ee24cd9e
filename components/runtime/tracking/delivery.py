"""Delivers records of the log to MLflow, with a handler for each kind of event. Idempotent."""

import io
import json
import re
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import mlflow
import PIL.Image
from mlflow.entities import LoggedModelOutput, Metric, Param
from mlflow.tracking import MlflowClient
from mlflow.tracking.multimedia import compress_image_size
from mlflow.utils.mlflow_tags import MLFLOW_GIT_COMMIT, MLFLOW_LOGGED_IMAGES, MLFLOW_RUN_NOTE, MLFLOW_SOURCE_NAME

from components.runtime import events
from components.runtime.events import LogEntry
from components.runtime.storage.artifact import Artifact
from components.runtime.storage.connection import shown
from components.runtime.storage.scratch import scratch_folder
from components.runtime.storage.store import Store
from components.runtime.tracking import names, registry
from components.runtime.tracking.event_log import stage_records
from components.runtime.tracking.promotion import Promotion, figures_of, promote_run, take
from components.runtime.tracking.runs import Runs, TrackedRun, record_inputs, search, what_is_missing
from components.sampling.image_files import encode_png

MAX_METRICS, MAX_PARAMS, MAX_PARAM_LENGTH, MAX_TAG_LENGTH = 1000, 100, 6000, 5000  # MLflow's limits of one call
HELD_OUT = "held_out"  # how figures of a trained model begin that others of its kind have too

PARAMETER = re.compile(r"[\w.\- :/]+")  # names that MLflow takes


class Delivery:
    """A connection to MLflow, with the runs seen so far."""

    def __init__(self, tracking_uri: str, *, experiment: str) -> None:
        """Connect. Raises MLflow's errors while MLflow is away."""
        mlflow.set_tracking_uri(tracking_uri)  # a registry in a SQLite file looks for its models there
        self.client = MlflowClient(tracking_uri)
        self.runs = Runs(self.client, tracking_uri, experiment)
        self.warnings: list[str] = []  # for the user
        self.promotions: dict[str, Promotion] = {}  # by run that ended well with models

    def deliver(self, records: Sequence[LogEntry]) -> None:
        """Send a record, or several records of a run's metrics."""
        first = records[0]
        if isinstance(first.event, events.Metrics):
            self._send(self.runs.get(first.run, first.key), records)
        elif isinstance(first.event, events.Text):
            tracked = self.runs.get(first.run, first.key)
            self.client.log_text(tracked.run_id, first.event.content, first.event.name)
        elif handle := HANDLERS.get(type(first.event)):
            handle(self, first, first.event)

    def pages(self, run: str) -> dict[str, str]:
        """Addresses of the pages of a run and its model's version; empty where MLflow is no server."""
        server = shown(str(self.client.tracking_uri)).rstrip("/")
        if not server.startswith("http") or (run, "") not in self.runs.tracked:
            return {}
        runs = f"{server}/#/experiments/{self.runs.experiment_id}/runs"
        pages = {"MLflow run": f"{runs}/{self.runs.tracked[run, ''].run_id}"}
        if made := self.promotions.get(run):
            pages["model version"] = f"{server}/#/models/{made.model}/versions/{made.version}"
        return pages

    def _start_run(self, record: LogEntry, event: events.RunStarted) -> None:
        tags = {f"cascade.{name}": value for name, value in event.tags.items()}
        tags |= {MLFLOW_SOURCE_NAME: "cascade", MLFLOW_GIT_COMMIT: event.tags.get("git_commit", "")}
        tags |= {MLFLOW_RUN_NOTE: f"Report: `{event.tags['report']}`"} if "report" in event.tags else {}
        tracked = self.runs.take_up(record.run, name=record.run, started=record.time, tags=tags)
        self._log_params(tracked, event.parameters)
        self.client.log_text(tracked.run_id, event.recipe_yaml, "recipe.yaml")

    def _start_stage(self, record: LogEntry, event: events.StageStarted) -> None:
        tracked = self._take_up_stage(record, {names.CACHED: "false"})
        self._log_params(tracked, event.config)
        if event.root:
            self._send(tracked, stage_records(Store(event.root)))
        data = [artifact for artifact in event.inputs.values() if artifact.kind != "model"]
        used = [artifact for artifact in event.inputs.values() if artifact.kind == "model"]
        models = [registry.find_logged_model(self.client, self.runs.experiment_id, artifact) for artifact in used]
        model_ids = [model.model_id for model in models if model]
        record_inputs(self.client, tracked.run_id, data=data, model_ids=model_ids)

    def _stage_cached(self, record: LogEntry, event: events.StageCached) -> None:
        run, artifact = record.run, event.artifact
        existing = self.runs.find(run, record.key)
        made_here = artifact.provenance.get("run") == run  # though the journal may be lost
        if existing is not None:  # it stays the run that made it
            tracked = self.runs.track(run, record.key, existing)
        elif made_here:
            tracked = self._take_up_stage(record, {names.CACHED: "false"})
            self._log_params(tracked, artifact.provenance["config"])
        else:
            tracked = self._show_cached(record, artifact)
        if made_here:
            self._send(tracked, stage_records(artifact.store))
            self._say_what_is_missing(record, tracked, artifact)
        self._register(tracked.run_id, record, artifact)
        ended = existing.info.end_time if existing is not None and existing.info.status == "FINISHED" else record.time
        self.client.set_terminated(tracked.run_id, "FINISHED", end_time=ended)

    def _show_cached(self, record: LogEntry, artifact: Artifact) -> TrackedRun:
        runs = search(self.client, self.runs.experiment_id, {names.KEY: record.key, names.CACHED: "false"})
        finished = [run for run in runs if run.info.status == "FINISHED"]
        maker = max(finished, key=lambda run: run.info.end_time or 0, default=None)  # the last without a cache
        tags, made_by = {names.CACHED: "true"}, "by a run that this MLflow does not know"
        if maker is not None:
            tags[names.MADE_BY] = maker.info.run_id
            link = f"#/experiments/{self.runs.experiment_id}/runs/{maker.info.run_id}"
            made_by = f"by [{maker.data.tags.get(names.RUN, maker.info.run_id)}]({link})"
        tracked = self._take_up_stage(record, tags)
        note = f"Cached: `{record.stage}` with this key was made {made_by}.\n\nArtifact: `{artifact.root}`"
        self.client.set_tag(tracked.run_id, MLFLOW_RUN_NOTE, note)
        return tracked

    def _send(self, tracked: TrackedRun, records: Iterable[LogEntry]) -> None:
        """Log the points of the metrics in the records that MLflow lacks."""
        points: dict[tuple[str, int], Metric] = {}  # by name and step: the first of each
        for record in records:
            if isinstance(record.event, events.Metrics):
                for name, value in record.event.values.items():
                    step = record.event.step
                    if name.startswith(names.SYSTEM):  # drawn by the seconds since the run began
                        step = max(0, (record.time - tracked.started) // 1000)
                    if step not in tracked.steps.get(name, ()):
                        points.setdefault((name, step), Metric(name, value, record.time, step))
        new = list(points.values())
        for start in range(0, len(new), MAX_METRICS):
            batch = new[start : start + MAX_METRICS]
            self.client.log_batch(tracked.run_id, metrics=batch)
            for point in batch:
                if not point.key.startswith(names.SYSTEM):
                    tracked.steps.setdefault(point.key, set()).add(point.step)

    def _image(self, record: LogEntry, event: events.Image) -> None:
        tracked, place = self.runs.get(record.run, record.key), (event.name, event.step)
        if place in tracked.images:
            return
        token = uuid.uuid5(uuid.NAMESPACE_URL, json.dumps([*place, record.time]))
        name = f"{event.name.replace('/', '~')}+step+{event.step}+timestamp+{record.time}+{token}"  # of MLflow's page
        with scratch_folder("image") as folder, PIL.Image.open(io.BytesIO(event.png)) as image:
            (folder / f"{name}.png").write_bytes(encode_png(image))
            compress_image_size(image).save(folder / f"{name}+compressed.webp")
            self.client.log_artifacts(tracked.run_id, str(folder), "images")
        self.client.set_tag(tracked.run_id, MLFLOW_LOGGED_IMAGES, True)
        tracked.images.add(place)

    def _end_stage(self, record: LogEntry, event: events.StageEnded) -> None:
        tracked = self.runs.get(record.run, record.key)
        if event.error:
            self.client.set_tag(tracked.run_id, "cascade.error", event.error[:MAX_TAG_LENGTH])
        if event.artifact is not None:
            self.client.set_tag(tracked.run_id, names.PLACE, event.artifact.root)
            self._say_what_is_missing(record, tracked, event.artifact)
            self._register(tracked.run_id, record, event.artifact)
        self.client.set_terminated(tracked.run_id, event.status, end_time=record.time)

    def _say_what_is_missing(self, record: LogEntry, tracked: TrackedRun, artifact: Artifact) -> None:
        if missing := what_is_missing(artifact, tracked):
            why = "they were in the journal of a driver that is gone, or has yet to send them"
            self.warnings.append(f"{record.stage}: MLflow lacks {missing}: {why}")

    def _describe_models(self, record: LogEntry, event: events.ModelsDescribed) -> None:
        tags = self.client.get_run(self.runs.get(record.run).run_id).data.tags
        for tag in (tag for tag in tags if tag.startswith(names.MODEL_TAG)):
            name = tag.removeprefix(names.MODEL_TAG)
            self.client.update_registered_model(name, event.about)
            self.client.update_model_version(name, tags[tag], f"{event.about}\n\n{event.details}")

    def _end_run(self, record: LogEntry, event: events.RunEnded) -> None:
        run_id = self.runs.get(record.run).run_id
        if event.status == "FINISHED":
            promotion = promote_run(self.client, run_id, models=record.models, how=event.promote, ended=record.time)
            self.promotions |= {} if promotion is None else {record.run: promotion}
        self.client.set_terminated(run_id, event.status, end_time=record.time)

    def _register(self, run_id: str, record: LogEntry, artifact: Artifact) -> None:
        """Register a model and note its version in the parent run, which decides on champions at the end.
        An evaluation is noted there too, and gives the run and its model their metrics."""
        parent = self.runs.get(record.run)
        if artifact.kind == "model":
            name = registry.name_of(record.models, artifact)
            if clash := take(self.client, name, self.client.get_run(parent.run_id).data.tags):
                line = f"not registered: {clash}; the same command with it trains nothing again"
                self.warnings += [line] if line not in self.warnings else []
                return
            version = registry.register_version(
                self.client, name, artifact, experiment_id=self.runs.experiment_id, run_id=run_id
            )
            model_id, outputs = version.source.removeprefix(names.REGISTRY), self.client.get_run(run_id).outputs
            if model_id not in {model.model_id for model in (outputs.model_outputs if outputs else [])}:
                self.client.log_outputs(run_id, [LoggedModelOutput(model_id, step=0)])
            self.client.set_tag(parent.run_id, names.MODEL_TAG + name, version.version)
            summary = artifact.metadata.get("summary", {})
            held_out = {name: value for name, value in summary.items() if name.startswith(HELD_OUT)}
            self._measure(run_id, held_out, model_id=model_id, time=record.time)
        elif figures := figures_of(artifact):
            self.client.set_tag(parent.run_id, names.FIGURES, json.dumps([figures.model_dump()]))
            tags = self.client.get_run(parent.run_id).data.tags
            name = names.registered_name(record.models)
            version = tags.get(names.MODEL_TAG + name)
            source = version and self.client.get_model_version(name, version).source
            model_id = source.removeprefix(names.REGISTRY) if source else None
            self._measure(parent.run_id, artifact.metadata["summary"], model_id=model_id, time=record.time)

    def _measure(self, run_id: str, values: dict[str, float], *, model_id: str | None, time: int) -> None:
        present = self.client.get_run(run_id).data.metrics
        new = [Metric(name, value, time, 0, model_id=model_id) for name, value in values.items() if name not in present]
        if new:
            self.client.log_batch(run_id, metrics=new)

    def _take_up_stage(self, record: LogEntry, tags: dict[str, str]) -> TrackedRun:
        tags = {names.STAGE: record.stage, **tags}
        return self.runs.take_up(record.run, record.key, name=record.stage, started=record.time, tags=tags)

    def _log_params(self, tracked: TrackedRun, parameters: Mapping[str, Any]) -> None:
        """Log parameters that the run lacks: they never change in MLflow, and a resumed run keeps its own."""
        present = self.client.get_run(tracked.run_id).data.params
        new = [Param(name, value) for name, value in flatten(parameters).items() if name not in present]
        for start in range(0, len(new), MAX_PARAMS):
            self.client.log_batch(tracked.run_id, params=new[start : start + MAX_PARAMS])


def flatten(parameters: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested parameters as MLflow's flat ones: `base.betas` -> "[0.9, 0.99]".
    A dictionary with a key that MLflow takes in no name, such as the pattern `*.bias`, is one parameter."""
    flat: dict[str, str] = {}
    for name, value in parameters.items():
        if isinstance(value, dict) and value and all(map(PARAMETER.fullmatch, value)):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value)
            flat[f"{prefix}{name}"] = text[:MAX_PARAM_LENGTH]
    return flat


def batches(records: Iterable[LogEntry]) -> list[list[LogEntry]]:
    """Joins metrics of a run between the run's other events; keeps the order of all else."""
    joined: list[list[LogEntry]] = []
    open_: dict[tuple[str, str], list[LogEntry]] = {}
    for record in records:
        place, metrics = (record.run, record.key), isinstance(record.event, events.Metrics)
        if metrics and place in open_:
            open_[place].append(record)
            continue
        joined.append([record])
        open_.pop(place, None)
        if metrics:
            open_[place] = joined[-1]
    return joined


HANDLERS: dict[type, Callable[[Delivery, LogEntry, Any], None]] = {
    events.RunStarted: Delivery._start_run,
    events.ModelsDescribed: Delivery._describe_models,
    events.RunEnded: Delivery._end_run,
    events.StageStarted: Delivery._start_stage,
    events.StageCached: Delivery._stage_cached,
    events.StageEnded: Delivery._end_stage,
    events.Image: Delivery._image,
}
