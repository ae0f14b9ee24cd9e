"""The journal's lines as calls of MLflow, one handler for each event. Delivering a line twice changes nothing."""

import json
import tempfile
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import PIL.Image
from mlflow.entities import Metric, Param
from mlflow.tracking import MlflowClient
from mlflow.tracking.multimedia import compress_image_size
from mlflow.utils.mlflow_tags import MLFLOW_GIT_COMMIT, MLFLOW_LOGGED_IMAGES, MLFLOW_RUN_NOTE, MLFLOW_SOURCE_NAME

from components.runtime.storage.artifact import Artifact
from components.runtime.tracking import registry
from components.runtime.tracking.journal import Journal, Line
from components.runtime.tracking.lines import as_artifact
from components.runtime.tracking.names import (
    CACHED,
    FIGURES,
    KEY,
    MADE_BY,
    MODEL_TAG,
    REGISTRY,
    RUN,
    STAGE,
    SYSTEM,
    WORKFLOW,
    registered_name,
)
from components.runtime.tracking.promotion import Promotion, figures_of, promote_run, take
from components.runtime.tracking.runs import (
    TrackedRun,
    artifact_location,
    as_tracked,
    find_maker,
    find_or_create_experiment,
    find_run,
    image_name,
    record_inputs,
    record_output,
    take_up,
    what_is_missing,
)
from components.sampling.image_files import encode_png

MAX_METRICS, MAX_PARAMS, MAX_PARAM_LENGTH, MAX_TAG_LENGTH = 1000, 100, 6000, 5000  # MLflow's limits of one call
HELD_OUT = "held_out"  # how figures of a trained model begin that others of its kind have too


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
        self.promotions: dict[str, list[Promotion]] = {}  # run that ended well -> what became of its models, if any

    def deliver(self, line: Line, journal: Journal) -> None:
        """Send one line of `journal`. Raises LookupError for an event that this version does not know."""
        blob = {"file": journal.blob(line["blob"])} if "blob" in line else {}
        HANDLERS[line["event"]](self, line | blob)

    def _start_run(self, line: Line) -> None:
        git_commit = line["tags"].get("git_commit", "")
        tags = {f"cascade.{name}": value for name, value in line["tags"].items()}
        tags |= {RUN: line["run"], KEY: WORKFLOW, MLFLOW_GIT_COMMIT: git_commit, MLFLOW_SOURCE_NAME: "cascade"}
        tracked = take_up(self.client, self.experiment_id, name=line["run"], started=line["time"], tags=tags)
        self.runs[line["run"], ""] = tracked
        self._log_params(tracked, line["parameters"])
        self.client.log_text(tracked.run_id, line["recipe_yaml"], "recipe.yaml")

    def _start_stage(self, line: Line) -> None:
        tracked = self._take_up_stage(line, {CACHED: "false"})
        self._log_params(tracked, line["config"])
        self._send(tracked, line.get("points", []))
        inputs = [as_artifact(document) for document in line["inputs"]]
        self._record_inputs(tracked.run_id, inputs)

    def _stage_cached(self, line: Line) -> None:
        run, artifact = line["run"], as_artifact(line["artifact"])
        existing = find_run(self.client, self.experiment_id, run=run, key=line["key"])
        made_here = artifact.provenance.get("run") == run  # though MLflow may have been away, and the journal is lost
        if existing is not None:  # it stays the run that made it
            tracked = self.runs[run, line["key"]] = as_tracked(self.client, existing)
        elif made_here:
            tracked = self._take_up_stage(line, {CACHED: "false"})
            self._log_params(tracked, artifact.provenance["config"])
        else:
            tracked = self._show_cached(line, artifact)
        if made_here:
            self._send(tracked, line.get("points", []))
            self._say_what_is_missing(line, tracked, artifact)
        self._register(tracked.run_id, line, artifact)
        self.client.set_terminated(tracked.run_id, "FINISHED", end_time=_end_of(existing) or line["time"])

    def _show_cached(self, line: Line, artifact: Artifact) -> TrackedRun:
        maker = find_maker(self.client, self.experiment_id, key=line["key"])
        tracked = self._take_up_stage(line, {CACHED: "true"} | ({MADE_BY: maker.info.run_id} if maker else {}))
        self.client.set_tag(tracked.run_id, MLFLOW_RUN_NOTE, self._cached_note(line, maker, artifact))
        return tracked

    def _cached_note(self, line: Line, maker: Any, artifact: Artifact) -> str:
        made_by = "by a run that this MLflow does not know"
        if maker is not None:
            link = f"#/experiments/{self.experiment_id}/runs/{maker.info.run_id}"
            made_by = f"by [{maker.data.tags.get(RUN, maker.info.run_id)}]({link})"
        return f"Cached: `{line['stage']}` with this key was made {made_by}.\n\nArtifact: `{artifact.root}`"

    def _metrics(self, line: Line) -> None:
        self._send(self._tracked(line), line["points"])

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
                if not point.key.startswith(SYSTEM):
                    tracked.steps.setdefault(point.key, set()).add(point.step)

    @staticmethod
    def _step(tracked: TrackedRun, name: str, step: int, time: int) -> int:
        """System metrics are drawn by the seconds since their run began."""
        return max(0, (time - tracked.started) // 1000) if name.startswith(SYSTEM) else step

    def _image(self, line: Line) -> None:
        tracked, place = self._tracked(line), (line["name"], line["step"])
        if place in tracked.images:
            return
        token = uuid.uuid5(uuid.NAMESPACE_URL, json.dumps([*place, line["time"]]))
        name = image_name(*place, time_ms=line["time"], token=str(token))
        with tempfile.TemporaryDirectory() as folder, PIL.Image.open(line["file"]) as image:
            (Path(folder) / f"{name}.png").write_bytes(encode_png(image))
            compress_image_size(image).save(Path(folder) / f"{name}+compressed.webp")
            self.client.log_artifacts(tracked.run_id, folder, "images")
        self.client.set_tag(tracked.run_id, MLFLOW_LOGGED_IMAGES, True)
        tracked.images.add(place)

    def _text(self, line: Line) -> None:
        self.client.log_text(self._tracked(line).run_id, line["file"].read_text(), line["name"])

    def _end_stage(self, line: Line) -> None:
        tracked = self._tracked(line)
        if line["error"]:
            self.client.set_tag(tracked.run_id, "cascade.error", line["error"][:MAX_TAG_LENGTH])
        if line["artifact"] is not None:
            artifact = as_artifact(line["artifact"])
            self.client.set_tag(tracked.run_id, "cascade.artifact", artifact.root)
            self._say_what_is_missing(line, tracked, artifact)
            self._register(tracked.run_id, line, artifact)
        self.client.set_terminated(tracked.run_id, line["status"], end_time=line["time"])

    def _say_what_is_missing(self, line: Line, tracked: TrackedRun, artifact: Artifact) -> None:
        if missing := what_is_missing(artifact, tracked):
            why = "they were in the journal of a driver that is gone, or has yet to send them"
            self.warnings.append(f"{line['stage']}: MLflow lacks {missing}: {why}")

    def _describe_models(self, line: Line) -> None:
        tags = self.client.get_run(self._tracked(line).run_id).data.tags
        for tag in (tag for tag in tags if tag.startswith(MODEL_TAG)):
            name = tag.removeprefix(MODEL_TAG)
            self.client.update_registered_model(name, line["about"])
            self.client.update_model_version(name, tags[tag], f"{line['about']}\n\n{line['details']}")

    def _end_run(self, line: Line) -> None:
        run_id = self._tracked(line).run_id
        if line["status"] == "FINISHED":
            models = line.get("models") or line["recipe"]  # a journal of before has the recipe's name alone
            how, ended = line.get("promote", "better"), line["time"]
            promotion = promote_run(self.client, run_id, models=models, how=how, ended=ended)
            self.promotions[line["run"]] = [] if promotion is None else [promotion]
        self.client.set_terminated(run_id, line["status"], end_time=line["time"])

    def _register(self, run_id: str, line: Line, artifact: Artifact) -> None:
        """Register a model artifact and remember its version in the parent run, for when that ends well; an evaluation
        is remembered there too, and gives the run and its model their metrics."""
        parent = self._tracked(line | {"key": ""})
        models = line.get("models") or line["recipe"]  # a journal of before has the recipe's name alone
        if artifact.kind == "model":
            if not self._may_register(parent.run_id, registry.model_name(artifact, models=models)):
                return
            registered = registry.register_artifact(
                self.client, artifact, models=models, experiment_id=self.experiment_id, run_id=run_id
            )
            record_output(self.client, run_id, model_id=registered.model_id)
            self.client.set_tag(parent.run_id, MODEL_TAG + registered.name, registered.version)
            summary = artifact.metadata.get("summary", {})
            held_out = {name: value for name, value in summary.items() if name.startswith(HELD_OUT)}
            self._measure(run_id, held_out, model_id=registered.model_id, line=line)
        elif figures := figures_of(artifact):
            self.client.set_tag(parent.run_id, FIGURES, json.dumps([figures.model_dump()]))
            tags = self.client.get_run(parent.run_id).data.tags
            name = registered_name(models)
            version = tags.get(MODEL_TAG + name)
            source = version and self.client.get_model_version(name, version).source
            model_id = source.removeprefix(REGISTRY) if source else None
            self._measure(parent.run_id, artifact.metadata["summary"], model_id=model_id, line=line)

    def _may_register(self, parent: str, name: str) -> bool:
        """True if a name is free or of the run's own images; checked before the run too, if MLflow answers then."""
        taken = take(self.client, name, self.client.get_run(parent).data.tags)
        if taken is not None:
            line = f"not registered: {taken}; the same command with it trains nothing again"
            self.warnings += [line] if line not in self.warnings else []
        return taken is None

    def _measure(self, run_id: str, values: dict[str, float], *, model_id: str | None, line: Line) -> None:
        """Give a run, and a model that it made, those of the metrics that the run has not."""
        known = self.client.get_run(run_id).data.metrics
        new = [
            Metric(name, value, line["time"], 0, model_id=model_id)
            for name, value in values.items()
            if name not in known
        ]
        if new:
            self.client.log_batch(run_id, metrics=new)

    def _record_inputs(self, run_id: str, inputs: list[Artifact]) -> None:
        data = [artifact for artifact in inputs if artifact.kind != "model"]
        keys = [artifact.key for artifact in inputs if artifact.kind == "model"]
        models = [registry.find_logged_model(self.client, self.experiment_id, key=key) for key in keys]
        record_inputs(self.client, run_id, data=data, model_ids=[model.model_id for model in models if model])

    def _take_up_stage(self, line: Line, tags: dict[str, str]) -> TrackedRun:
        parent = self._tracked(line | {"key": ""})
        tracked = take_up(
            self.client,
            self.experiment_id,
            name=line["stage"],
            started=line["time"],
            tags={RUN: line["run"], STAGE: line["stage"], KEY: line["key"], **tags},
            parent=parent.run_id,
        )
        self.runs[line["run"], line["key"]] = tracked
        return tracked

    def _tracked(self, line: Line) -> TrackedRun:
        place = (line["run"], line["key"])
        if place not in self.runs:  # begun by another process
            run = find_run(self.client, self.experiment_id, run=line["run"], key=line["key"])
            if run is None:
                raise LookupError(f"MLflow has no run {line['run']} {line['key']}; was it deleted?")
            self.runs[place] = as_tracked(self.client, run)
        return self.runs[place]

    def _log_params(self, tracked: TrackedRun, parameters: dict[str, Any]) -> None:
        """Parameters never change in MLflow: a run that is taken up keeps those it has."""
        known = {} if tracked.new else self.client.get_run(tracked.run_id).data.params
        new = [Param(name, value) for name, value in flatten(parameters).items() if name not in known]
        for start in range(0, len(new), MAX_PARAMS):
            self.client.log_batch(tracked.run_id, params=new[start : start + MAX_PARAMS])


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


def _end_of(run: Any) -> int | None:
    return None if run is None or run.info.status != "FINISHED" else run.info.end_time


HANDLERS: dict[str, Callable[[Delivery, Line], None]] = {
    "start_run": Delivery._start_run,
    "describe_models": Delivery._describe_models,
    "end_run": Delivery._end_run,
    "start_stage": Delivery._start_stage,
    "stage_cached": Delivery._stage_cached,
    "end_stage": Delivery._end_stage,
    "metrics": Delivery._metrics,
    "image": Delivery._image,
    "text": Delivery._text,
}
