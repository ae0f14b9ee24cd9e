"""What trainings make of the machine, told by real ones: in MLflow's run, in the table and in the report's storage."""

import dataclasses
import gzip
import json
import time
from pathlib import Path
from typing import Any

import pytest
import ray
from mlflow.tracking import MlflowClient

from components.configuration.conditions import DatasetInfo
from components.data.shards import load_index
from components.evaluation.measures import MEASURES
from components.runtime import events
from components.runtime.execution import Profiling
from components.runtime.storage.artifact import Artifact
from components.stages.training import train_model
from components.training.batches import to_batch
from components.training.loop import fit
from components.training.parallel import ALONE
from components.training.reporting import Reporter
from components.training.step_model import step_flops
from pipelines.engine.recorder import EXPERIMENT, ActorRecorder, RunRecorder
from tests.distributed.recording import FileRecorder
from tests.distributed.runs import context_of, images_artifact
from tests.local_cluster import ROOT
from tests.metric_names import lacking, queries, series_at
from tests.tiny_training import batches, config_of, make_task

ON_CPUS = {"samples_per_second", "achieved_gflops", "data_wait_fraction", "peak_memory_gb"}


def test_measures_are_in_mlflows_run_and_in_the_table(mlflow_server: str, tmp_path: Path, short_requests: None) -> None:
    run, config = f"measures-{time.time_ns()}", config_of("pixelcnn", total_steps=10)
    recorder = RunRecorder(tracking=mlflow_server, spool=str(tmp_path / "spool"))
    recorder.emit(events.RunStarted(run, "", {}, {"name": "tiny", "git_commit": ""}))
    recorder.emit(events.StageStarted("base", run, {}, {}))
    told: dict[str, Any] = {"stage": "base", "worker": ALONE, "recorder": recorder, "start_step": 0}
    reporter = Reporter(config.optimization, **told, step_flops=1e9)
    fit(make_task(config), reporter.timed(batches(config, to_batch)), config.optimization, log=reporter.log)
    recorder.emit(events.StageEnded("base", "FINISHED"))
    assert recorder.close("FINISHED").warnings == []
    client = MlflowClient(mlflow_server)
    experiment = client.get_experiment_by_name(EXPERIMENT)
    (found,) = client.search_runs([experiment.experiment_id], f"tags.`cascade.stage_key` = '{run}'")
    assert MEASURES.keys() & found.data.metrics.keys() == ON_CPUS
    assert [point.step for point in client.get_metric_history(found.info.run_id, "achieved_gflops")] == [5, 10]
    (status,) = recorder.snapshot()
    assert status.measures == pytest.approx({name: found.data.metrics[name] for name in ON_CPUS})


class Told(events.Recorder):
    """Tells a file and the run's actor."""

    def __init__(self, file: FileRecorder, actor: Any) -> None:
        self.file, self.run = file, ActorRecorder(actor)

    def emit(self, event: events.Event) -> None:
        self.file.emit(event)
        self.run.emit(event)


@pytest.fixture(scope="module")
def trained(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Told, Artifact]:
    """A stage on Ray with traces, told to a run's recorder: its folder, what it told, the model."""
    folder = tmp_path_factory.mktemp("trained")
    context = context_of(folder, "base", workers=2)
    profiling = Profiling(first_step=4, last_step=6, folder=str(folder / "traces"))
    told = Told(FileRecorder(folder / "base.jsonl"), ray.remote(num_cpus=0)(RunRecorder).remote())
    for event in (
        events.RunStarted("tiny", "", {}, {"name": "tiny"}),
        events.StageStarted("base", context.key, {}, {}),
    ):
        ray.get(told.run.actor.emit.remote(event))
    resources = context.resources.model_copy(update={"profiling": profiling})
    context = dataclasses.replace(context, resources=resources, recorder=told)
    return folder, told, train_model(config_of("base"), context, images=images_artifact(folder))


def test_every_query_of_the_dashboard_of_trainings_finds_its_metrics_and_labels(trained: tuple[Path, Told, Artifact]):
    actor, (node,) = trained[1].run.actor, ray.nodes()
    asked = {name for query in queries(ROOT / "infra/monitoring/cascade-training.json") for name in query.metrics}
    of_gpus = MEASURES.keys() - ON_CPUS - {"checkpoint_hold_seconds"}
    absent = {f"ray_cascade_train_{name}" for name in of_gpus} | {"ray_node_gpus_utilization"}
    assert asked >= absent
    wanted = [q for q in queries(ROOT / "infra/monitoring/cascade-training.json") if not q.metrics & absent]
    deadline = time.monotonic() + 60
    while missing := lacking(wanted, series_at(f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}")):
        assert time.monotonic() < deadline, missing
        ray.get(actor.emit.remote(events.Progress("base", 20, 20)))  # as a training that goes on
        time.sleep(2)


def test_a_stage_on_ray_leaves_its_trace_and_says_how_long_checkpoints_held_it(trained: tuple[Path, Told, Artifact]):
    folder, told, artifact = trained
    (trace,) = (folder / "traces").iterdir()
    assert trace.name == "base-steps-4-6.json.gz"
    names = {event.get("name") for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]}
    assert {"step 4", "step 5", "step 6", "aten::convolution_backward"} <= names
    assert not {"step 3", "step 7"} & names
    index, logged = load_index(images_artifact(folder).url("index.json")), told.file.lines("metrics")
    text = index.text.model_dump(include={"vocab_size", "text_length"})
    flops = step_flops(config_of("base"), DatasetInfo(num_classes=len(index.classes), **text))
    for line in logged:
        steps_per_second = line["samples_per_second"] / config_of("base").optimization.global_batch_size
        assert line["achieved_gflops"] * 1e9 == pytest.approx(flops * steps_per_second)
    held = [line.get("checkpoint_hold_seconds", 0.0) for line in logged]
    assert [seconds > 0 for seconds in held] == [False, False, True, False]  # of the one after step 10
    assert artifact.metadata["summary"]["checkpoint_hold_seconds"] > sum(held)  # with the last one
