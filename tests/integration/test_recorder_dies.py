"""`kill -9` of the run's recorder, as when memory runs out: the run ends well, and MLflow has everything once."""

import contextlib
import itertools
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import ray
from mlflow.tracking import MlflowClient

from components.runtime import events
from pipelines.engine.recorder import EXPERIMENT, ActorRecorder, RunRecorder
from tests.in_process import in_process
from tests.integration.conftest import FEW, SCENES, settings

pytestmark = pytest.mark.usefixtures("ray_cluster")
MOMENTS = (0.2, 4.0, 1.0)  # seconds after a recorder was started at which it is killed, again and again
STEPS = FEW["total_steps"]


def recorders() -> dict[int, psutil.Process]:
    """All that live, by pid."""
    named = psutil.process_iter(["cmdline"])
    return {each.pid: each for each in named if " ".join(each.info["cmdline"] or ()).startswith("ray::RunRecorder")}


@contextlib.contextmanager
def killing() -> Iterator[list[int]]:
    """Kill each new recorder meanwhile; yields the list of those that were killed."""
    others, killed, over = set(recorders()), list[int](), threading.Event()

    def kill() -> None:
        for seconds in itertools.chain(MOMENTS, itertools.repeat(20.0)):
            while not (new := recorders().keys() - others - {*killed}):
                if over.wait(0.05):
                    return
            if over.wait(seconds):
                return
            victim = new.pop()
            with contextlib.suppress(psutil.NoSuchProcess):  # the run has just ended it
                psutil.Process(victim).kill()
                killed.append(victim)

    thread = threading.Thread(target=kill)
    thread.start()
    yield killed
    over.set()
    thread.join()


def test_a_process_that_ends_has_waited_until_a_recorder_that_died_has_all_that_it_sent(tmp_path: Path):
    others, lines = set(recorders()), [f"line {number}" for number in range(20)]
    body = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(RunRecorder)
    begun = events.RunStarted("r", "", {}, {"name": "tiny"})
    actor = body.remote(spool=str(tmp_path / "spool"), journal="own", begun=begun)
    ray.get(actor.snapshot.remote())
    (pid,) = recorders().keys() - others

    @ray.remote(num_cpus=0, max_calls=1)
    def send(recorder: ActorRecorder) -> None:
        psutil.Process(pid).suspend()  # nothing is taken before its death
        for line in lines:
            recorder.emit(events.Warning("base", line))
        psutil.Process(pid).kill()
        recorder.settle()

    ray.get(send.remote(ActorRecorder(actor)))
    (status,) = ray.get(actor.snapshot.remote())
    assert sorted(status.warnings) == sorted(lines)


def test_a_run_whose_recorder_is_killed_again_and_again_ends_well_and_mlflow_has_everything_once(
    mlflow_server: str, tmp_path: Path
):
    name = f"dies-{time.time_ns()}"
    command = ["run", "--recipe", "gan", "--until", "gan", "--name", name, "--tracking", mlflow_server, *SCENES]
    command += settings("model", **FEW | {"log_every": 1}, channels=8, discriminator_channels=8)
    with killing() as killed:
        done = in_process(*command, cwd=tmp_path, on_ray=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(killed) >= 2
    assert "the run's recorder died" in done.stdout
    assert f"model: models:/image-cascade-{name}-gan@champion" in " ".join(done.stdout.split())
    assert "Traceback" not in done.stdout + done.stderr
    client = MlflowClient(mlflow_server)
    experiment = client.get_experiment_by_name(EXPERIMENT)
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], f"tags.`cascade.run` LIKE '{name}-%'")
    assert {run.info.status for run in runs} == {"FINISHED"}
    stages = [run.data.tags.get("cascade.stage", "") for run in runs]
    assert sorted(stages) == sorted({*stages}), "no run twice"
    (training,) = (run.info.run_id for run in runs if run.data.tags.get("cascade.stage") == "gan")
    losses = [metric for metric in client.get_run(training).data.metrics if metric.startswith("loss")]
    for metric in losses:
        assert sorted(point.step for point in client.get_metric_history(training, metric)) == [*range(1, STEPS + 1)]
    images = [file.path for file in client.list_artifacts(training, "images") if file.path.endswith(".png")]
    assert sorted(int(path.split("+step+")[1].split("+")[0]) for path in images) == [3, 6]
    assert not list((tmp_path / "runs" / "spool").iterdir())
