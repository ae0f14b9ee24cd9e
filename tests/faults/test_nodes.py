"""Nodes that share nothing but the network: what is lost with one of them, and what the head holds in memory."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import s3fs
from mlflow.entities import Run as MlflowRun
from mlflow.tracking import MlflowClient

from components.runtime.events import Metrics
from components.runtime.tracking.event_log import stage_records
from components.training.results import read_finished
from tests.conftest import mlflow_process
from tests.emulators import in_environment
from tests.faults.cluster import TRAINER
from tests.faults.conftest import Record
from tests.faults.memory import watched
from tests.faults.runs import Stored, wait_until
from tests.integration.conftest import FEW, settings
from tests.nodes import Cluster, Node, nodes

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1500)]
PROVES = ("components/stages", "components/training", "pipelines")
POOL = "ray::PoolWorker"
STEPS, INTERVAL = {"base": 800, "prior": 400}, 20  # long enough to be hit
SHORT = 100
LOGGED, SHOWN = 5, 200  # steps between points, and between images
OFTEN = {"checkpoint_every": INTERVAL, "log_every": LOGGED, "sample_every": SHOWN}
WHOLE = [setting for stage, steps in STEPS.items() for setting in settings(stage, total_steps=steps, **OFTEN)]
MEASURED = settings("samples", measured_samples=64)
EVALUATED = settings("evaluation", reference_samples=256, held_out_samples=64)
MIB = 2**20
IMPORTED, GROWTH, HEAD = 430 * MIB, 300 * MIB, 6 * 2**30  # bytes: of a process that does nothing yet, more, of them all


@pytest.fixture(scope="module")
def tracking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[subprocess.Popen]:
    """An MLflow server that can be stopped for a while; its address stands in the environment."""
    with mlflow_process(tmp_path_factory.mktemp("mlflow")) as (address, server):
        with in_environment({"MLFLOW_TRACKING_URI": address}):
            yield server
        os.killpg(server.pid, signal.SIGCONT)


@pytest.fixture(scope="module")
def cluster(s3_server: str, tracking: subprocess.Popen) -> Iterator[Cluster]:
    s3fs.S3FileSystem(endpoint_url=s3_server, skip_instance_cache=True).mkdir("nodes")
    with nodes(2) as cluster:
        yield cluster


class Submitted(Stored):
    """`ray job submit -- python pipelines/full_cascade.py …`, on a storage and in an MLflow run of its own."""

    def __init__(self, cluster: Cluster, place: Path, name: str, *options: str) -> None:
        super().__init__(place, storage=f"s3://nodes/{name}")
        self.cluster, self.name, self.options = cluster, name, options

    def start(self) -> subprocess.Popen:
        command = ["python", "pipelines/full_cascade.py", "--storage", self.storage, "--run", self.name, *self.options]
        self.drivers.append(self.cluster.submit(*command, log=self.log))
        return self.drivers[-1]


def smoke(cluster: Cluster, place: Path, name: str, *options: str) -> Submitted:
    return Submitted(cluster, place, name, "--recipe", "smoke", *WHOLE, *options)


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Hashes of the whole workflow on these nodes when nobody disturbs it."""
    run = smoke(cluster, tmp_path_factory.mktemp("undisturbed"), "undisturbed")
    run.finish(run.start())
    return run.hashes()


def lose(cluster: Cluster, title: str, run: Stored, when: Callable[[], bool], *, every: bool = False) -> None:
    """Kill a node, or every node, that does such work, with its disk, and put empty ones in their place."""

    def working() -> list[Node]:
        return [node for node in cluster.workers if node.processes(title)]

    wait_until(lambda: when() and bool(working()), run)
    lost = working() if every else working()[:1]
    for node in lost:
        cluster.kill(node)
    cluster.add(len(lost))


def test_workers_lost_with_their_disks_change_no_byte(
    cluster: Cluster, tmp_path: Path, undisturbed: dict[str, str], record: Record
):
    """One while models train, all while the prior trains on tokens that they made, one while images are sampled."""
    run = smoke(cluster, tmp_path, "workers")
    driver = run.start()
    lose(cluster, TRAINER, run, lambda: run.step("base") >= 2 * INTERVAL)
    assert run.step("base") < STEPS["base"]
    lose(cluster, TRAINER, run, lambda: run.step("prior") >= 2 * INTERVAL, every=True)
    assert run.step("prior") < STEPS["prior"]
    lose(cluster, POOL, run, lambda: "samples" in run.stages() and bool(run.stage("samples").list("files")))
    assert "evaluation" not in run.stages()
    run.finish(driver)
    assert run.hashes() == undisturbed
    record("workers lost with their disks, empty ones join", 3, proof(undisturbed))


def test_a_head_lost_with_its_journal_loses_nothing_that_mlflow_had_and_says_what_it_lost(
    cluster: Cluster, tmp_path: Path, tracking: subprocess.Popen, undisturbed: dict[str, str], record: Record
):
    """MLflow is away for a while before, so there is something to lose."""
    run = smoke(cluster, tmp_path, "head")
    run.start()
    wait_until(lambda: run.step("base") >= 2 * INTERVAL and bool(history("head", "base")), run)
    had = history("head", "base")
    os.killpg(tracking.pid, signal.SIGSTOP)
    before = run.step("base")
    wait_until(lambda: run.step("base") >= before + 3 * INTERVAL, run)
    assert any(name.endswith("events.jsonl") for name in cluster.head.files())
    cluster.end()
    os.killpg(tracking.pid, signal.SIGCONT)
    assert run.step("base") < STEPS["base"]
    cluster.start_head()
    cluster.add(2)
    run.finish(run.start())
    assert run.hashes() == undisturbed
    points = history("head", "base")
    assert had.items() <= points.items()
    lost = {"points": {*range(LOGGED, STEPS["base"] + 1, LOGGED)} - points.keys()}
    lost["images"] = {*range(SHOWN, STEPS["base"] + 1, SHOWN)} - shown("head", "base")
    said = next((line for line in run.said().splitlines() if line.startswith("warning: base: MLflow lacks")), "")
    for kind, steps in lost.items():
        assert (kind in said) == bool(steps), f"{kind} of {sorted(steps)} are lost; said: {said!r}"
    figures = ", ".join(f"{len(steps)} {kind}" for kind, steps in lost.items())
    print(f"{len(had)} points had arrived; lost, and said: {figures}", flush=True)
    record("head lost with MLflow's journal", 1, f"{proof(undisturbed)}; said: {figures} lost")


def test_a_worker_killed_while_it_evaluates_repeats_no_step(cluster: Cluster, tmp_path: Path, record: Record):
    options = ["--until", "base", *settings("base", total_steps=SHORT)]
    run = smoke(cluster, tmp_path, "evaluation", *options)
    driver = run.start()
    wait_until(lambda: run.step() == SHORT, run, poll=0.02)
    (trainer,) = [process for node in cluster.workers for process in node.processes(TRAINER)]
    trainer.kill()
    killed = time.time()
    assert read_finished(run.train()) is None, "too late: evaluation had ended"
    run.finish(driver)
    points = [record for record in stage_records(run.stage("base")) if isinstance(record.event, Metrics)]
    assert [record.event.step for record in points] == list(range(LOGGED, SHORT + 1, LOGGED))
    assert points[-1].time / 1000 < killed
    record("kill -9 of a worker while it evaluates the finished model", 1, f"step {SHORT} was not taken again")


class Brief(NamedTuple):
    """A recipe with few steps."""

    trained: tuple[str, ...]
    options: tuple[str, ...] = ()


RECIPES = {
    "smoke": Brief(("tokenizer", "prior", "base", "upsamplers.0")),
    "vqgan_transformer": Brief(("tokenizer", "prior"), (*MEASURED, *EVALUATED)),
    "maskgit": Brief(("tokenizer", "prior"), (*MEASURED, *EVALUATED)),
    "depth_transformer": Brief(("tokenizer", "condition.tokenizer", "prior"), (*MEASURED, *EVALUATED)),
    "latent_diffusion": Brief(("autoencoder", "base"), (*MEASURED, *EVALUATED)),
    "dalle2": Brief(("contrastive", "diffusion_prior", "base", "upsamplers.0"), (*MEASURED, *EVALUATED)),
    "imagen": Brief(("base", "upsamplers.0"), (*MEASURED, *EVALUATED)),
    "palette": Brief(("model",), (*settings("restoration", reference_samples=256, samples=16),)),
    "classifier_guided": Brief(("autoencoder", "classifier", "base"), (*MEASURED, *EVALUATED)),
    "fashion_guidance": Brief(  # four trainings at once
        ("base", "weaker", "classifier", "judge"),
        (
            *settings("images", source="scenes", limit=2048, samples_per_shard=512),
            *settings("guidance_study", samples=32, reference_samples=256, scales="[2.0]", classifier_scales="[1.0]"),
            *MEASURED,
            *EVALUATED,
        ),
    ),
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_each_kind_of_workflow_ends_well_on_nodes_that_share_nothing_and_the_head_stays_small(
    cluster: Cluster, tmp_path: Path, recipe: str, record: Record
):
    brief = RECIPES[recipe]
    few = [setting for part in brief.trained for setting in settings(part, **FEW)]
    run = Submitted(cluster, tmp_path, f"few-{recipe}", "--recipe", recipe, *few, *brief.options)
    with watched(cluster.head) as memory:
        run.finish(run.start())
    title, peak = next(iter(memory.by_title().items()))
    figures = f"head {memory.total / 2**30:.1f} GiB, largest process {peak / MIB:.0f} MiB ({title})"
    print(f"{recipe}: {figures}; {[(name, size // MIB) for name, size in memory.by_title().items()][:8]}", flush=True)
    assert peak <= IMPORTED + GROWTH, figures
    assert memory.total <= HEAD, figures
    record(f"none: {recipe} on two empty nodes", 1, f"exit code 0; {figures}")


def history(run: str, stage: str) -> dict[int, tuple[float, int]]:
    """Step -> value and time of the points of a stage's loss that MLflow has; each step is there once."""
    client, runs = tracked(run, stage)
    points = [point for found in runs for point in client.get_metric_history(found.info.run_id, "loss")]
    assert len({point.step for point in points}) == len(points)
    return {point.step: (point.value, point.timestamp) for point in points}


def shown(run: str, stage: str) -> set[int]:
    """steps of the images of a stage that MLflow has."""
    client, runs = tracked(run, stage)
    names = [file.path for found in runs for file in client.list_artifacts(found.info.run_id, "images")]
    return {int(name.split("+step+")[1].split("+")[0]) for name in names}


def tracked(run: str, stage: str) -> tuple[MlflowClient, list[MlflowRun]]:
    client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    experiment = client.get_experiment_by_name("image-cascade")
    wanted = f"tags.`cascade.run` = '{run}' and tags.`cascade.stage` = '{stage}'"
    return client, [] if experiment is None else list(client.search_runs([experiment.experiment_id], wanted))


def proof(hashes: dict[str, str]) -> str:
    return f"{len(hashes)} stages with the same bytes, base sha256 {hashes['base'][:12]}…"
