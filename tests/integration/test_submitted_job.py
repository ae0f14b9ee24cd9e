"""`ray job submit` as typed, to a cluster with token authentication whose machines share nothing but the network: what
one of them needs of another is in object storage, and a model is in the registry."""

import base64
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest
import s3fs
from mlflow import MlflowClient
from PIL import Image

from components.evaluation.obedience import parse_caption
from tests.integration.conftest import FEW, settings
from tests.nodes import Cluster, nodes

STAGES = ("images", "tokenizer", "tokens", "prior", "base", "upsampler_32", "cascade", "samples", "evaluation")
MODELS = ("tokenizer", "prior", "base", "upsampler_32")
TRAINED = ("tokenizer", "prior", "base", "upsamplers.0")
SMALL = [
    *settings("images", limit=128, samples_per_shard=32),
    *[setting for part in TRAINED for setting in settings(part, **FEW, log_every=1)],
    *settings("samples", measured_samples=8, images_per_class=1, num_prompts=1, images_per_prompt=1),
    *settings("evaluation", reference_samples=32, held_out_samples=8),
]
PROGRAM = ["python", "pipelines/full_cascade.py", "--recipe", "smoke", *SMALL]
LEFT = ("tmp/ray/", "tmp/home/.cache/")  # on a node's disk: Ray's logs, shipped code, and what libraries keep
YET_TO_SEND = "has yet to send them"  # one driver says so of what the other one's journal holds

pytestmark = pytest.mark.timeout(1200)


@pytest.fixture(scope="module")
def cluster(s3_server: str, mlflow_server: str) -> Iterator[Cluster]:
    """A head and two workers."""
    s3fs.S3FileSystem(endpoint_url=s3_server, skip_instance_cache=True).mkdir("nodes")
    with nodes(2, CASCADE_STORAGE="s3://nodes/runs", MLFLOW_TRACKING_URI=mlflow_server) as started:
        yield started


@pytest.fixture(scope="module")
def two_drivers(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Texts printed by two jobs that were submitted at once on one storage; the second wants the first stages alone."""
    logs = [tmp_path_factory.mktemp("job") / "printed" for _ in range(2)]
    ends = ([], ["--until", "tokens"])
    jobs = [
        cluster.submit(*PROGRAM, *end, log=log, options=("--working-dir", "."))
        for end, log in zip(ends, logs, strict=True)
    ]
    for job, log in zip(jobs, logs, strict=True):
        assert job.wait(900) == 0, log.read_text()[-4000:]
    return [log.read_text() for log in logs]


@pytest.fixture(scope="module")
def client(mlflow_server: str) -> MlflowClient:
    return mlflow.MlflowClient(mlflow_server)


def test_two_drivers_at_once_commit_each_stage_once(s3_server: str, two_drivers: list[str]):
    store = s3fs.S3FileSystem(endpoint_url=s3_server, skip_instance_cache=True, use_listings_cache=False)
    assert all("report: s3://nodes/runs/runs/smoke-" in text for text in two_drivers)
    warnings = [line for text in two_drivers for line in text.splitlines() if "warning" in line]
    assert [line for line in warnings if YET_TO_SEND not in line] == []
    for stage in STAGES:
        (key,) = store.ls(f"nodes/runs/stages/{stage}", detail=False)
        attempts = [name for name in store.ls(key, detail=False) if "/attempt-" in name]
        assert store.exists(f"{key}/manifest.json"), stage
        assert len(attempts) <= 1, f"{stage} was run more than once"


def test_nothing_but_logs_and_shipped_code_is_left_on_a_disk(cluster: Cluster, two_drivers: list[str]):
    for node in (cluster.head, *cluster.workers):
        assert [name for name in node.files() if not name.startswith(LEFT)] == [], node.name


def test_a_bare_submission_finds_everything_cached(cluster: Cluster, two_drivers: list[str], tmp_path: Path):
    assert cluster.submit(*PROGRAM, log=tmp_path / "printed").wait(900) == 0
    printed = (tmp_path / "printed").read_text()
    for stage in STAGES:
        assert f"{stage}: cached" in printed


def test_without_the_token_nobody_gets_in(cluster: Cluster, tmp_path: Path):
    assert cluster.submit(*PROGRAM, log=tmp_path / "printed", RAY_AUTH_TOKEN="0" * 64).wait(300) != 0


def test_mlflow_shows_the_runs_their_stages_and_their_lineage(client: MlflowClient, two_drivers: list[str]):
    experiment = client.get_experiment_by_name("image-cascade")
    names = [re.findall(r"report: s3://nodes/runs/runs/([^/]+)/", text)[0] for text in two_drivers]
    wanted = [f"tags.`cascade.run` = '{name}'" for name in names]
    runs = [run for each in wanted for run in client.search_runs([experiment.experiment_id], each)]
    children = [run for run in runs if "mlflow.parentRunId" in run.data.tags]
    assert len(runs) == len(children) + 2
    assert {run.info.run_name for run in children} == set(STAGES)
    assert {run.info.status for run in runs} == {"FINISHED"}
    base = next(run for run in children if run.info.run_name == "base" and "loss" in run.data.metrics)
    base = client.get_run(base.info.run_id)
    assert len(client.get_metric_history(base.info.run_id, "loss")) >= 5
    assert base.inputs.dataset_inputs
    assert base.outputs.model_outputs
    composed = [client.get_run(run.info.run_id) for run in children if run.info.run_name == "cascade"]
    assert max(len(run.inputs.model_inputs) for run in composed) == len(MODELS)


def test_every_model_is_registered_and_the_run_is_champion(client: MlflowClient, two_drivers: list[str]):
    for name in ("image-cascade-smoke", *(f"image-cascade-smoke-{model}" for model in MODELS)):
        version = client.get_model_version_by_alias(name, "champion")
        assert version.version == "1"
        assert version.tags["cascade.stage_key"]


def test_models_that_read_captions_name_some_and_no_others(s3_server: str, two_drivers: list[str]):
    store = s3fs.S3FileSystem(endpoint_url=s3_server, skip_instance_cache=True, use_listings_cache=False)
    offered = {}
    for path in store.glob("nodes/**/attempt-*/model.json"):
        offered[path.split("/stages/")[1].partition("/")[0]] = json.loads(store.cat(path))["settings"].get(
            "prompts", []
        )
    assert {name: len(prompts) for name, prompts in offered.items() if prompts} == {"prior": 12, "base": 12}
    assert all(map(parse_caption, offered["prior"] + offered["base"]))


def test_the_registered_cascade_samples_by_both_generators_elsewhere(cluster: Cluster, two_drivers: list[str]):
    program = (
        "import json, mlflow, sys; model = mlflow.pyfunc.load_model('models:/image-cascade-smoke@champion');"
        "rows = [{'label': '1', 'seed': 3, 'generator': generator} for generator in ('diffusion', 'tokens')];"
        "print(json.dumps([list(model.predict(rows)), list(model.predict(rows[:1]))]))"
    )
    variables = os.environ | {"MLFLOW_TRACKING_URI": cluster.environment["MLFLOW_TRACKING_URI"]}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=variables, cwd="/", capture_output=True, text=True, timeout=300, check=True)
    both, alone = json.loads(done.stdout.splitlines()[-1])
    images = [Image.open(io.BytesIO(base64.b64decode(text))) for text in (*both, *alone)]
    assert [image.size for image in images] == [(32, 32)] * 3
    difference = max(abs(a - b) for a, b in zip(images[0].tobytes(), images[2].tobytes(), strict=True))
    assert difference <= 1
