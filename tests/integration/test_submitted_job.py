"""The cluster as typed: a Ray head with token authentication, an S3 server, an MLflow server, `ray job submit`."""

import io
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from tests.integration.conftest import FEW, settings
from tests.local_cluster import ROOT, local_cluster

STAGES = ("images", "tokenizer", "tokens", "prior", "base", "upsampler_32", "cascade", "samples", "evaluation")
MODELS = ("tokenizer", "prior", "base", "upsampler_32")
SUBMIT = [str(Path(sys.executable).with_name("ray")), "job", "submit"]
TRAINED = ("tokenizer", "prior", "base", "upsamplers.0")
SMALL = [
    *settings("images", limit=128, samples_per_shard=32),
    *[setting for part in TRAINED for setting in settings(part, **FEW, log_every=1)],
    *settings("samples", measured_samples=8, images_per_class=1, num_prompts=1, images_per_prompt=1),
    *settings("evaluation", reference_samples=32, held_out_samples=8),
]
PROGRAM = ["--", "python", "pipelines/full_cascade.py", "--recipe", "smoke", *SMALL]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Environment of a user of the cluster that infra/local/cluster.sh starts."""
    with local_cluster(tmp_path_factory.mktemp("cluster")) as known:
        yield known


@pytest.fixture(scope="module")
def two_drivers(cluster: dict[str, str]) -> list[str]:
    """What two jobs print that were submitted at once on one storage."""
    places = ["--storage", cluster["CASCADE_STORAGE"], "--tracking", cluster["MLFLOW_TRACKING_URI"]]
    command = [*SUBMIT, "--working-dir", ".", *PROGRAM, *places]
    jobs = [
        subprocess.Popen(command, cwd=ROOT, env=cluster, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for _ in range(2)
    ]
    printed = [job.communicate(timeout=900)[0] for job in jobs]
    for job, text in zip(jobs, printed, strict=True):
        assert job.returncode == 0, text[-4000:]
    return printed


@pytest.fixture(scope="module")
def store(cluster: dict[str, str], two_drivers: list[str]) -> "s3fs.S3FileSystem":  # noqa: F821
    import s3fs

    return s3fs.S3FileSystem(
        key="local", secret="local", endpoint_url=cluster["AWS_ENDPOINT_URL"], use_listings_cache=False
    )


@pytest.mark.timeout(1200)
def test_two_drivers_at_once_commit_each_stage_once(store, two_drivers: list[str]):
    assert all("report: s3://cascade/runs/runs/smoke-" in text for text in two_drivers)
    for stage in STAGES:
        (key,) = store.ls(f"cascade/runs/stages/{stage}", detail=False)
        attempts = [name for name in store.ls(key, detail=False) if "/attempt-" in name]
        assert store.exists(f"{key}/manifest.json"), stage
        assert len(attempts) <= 1, f"{stage} was run more than once"


def test_a_bare_submission_finds_everything_cached(cluster: dict[str, str], two_drivers: list[str]):
    started = time.monotonic()
    done = subprocess.run([*SUBMIT, *PROGRAM], cwd=ROOT, env=cluster, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-4000:]
    for stage in STAGES:
        assert f"{stage}: cached" in done.stdout
    print(f"a cached run took {time.monotonic() - started:.0f} s with its submission")


def test_without_the_token_nobody_gets_in(cluster: dict[str, str], tmp_path: Path):
    (tmp_path / "token").write_text("0" * 64)
    stranger = {**cluster, "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}
    done = subprocess.run([*SUBMIT, *PROGRAM], cwd=ROOT, env=stranger, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0


def test_mlflow_shows_the_run_its_stages_and_their_lineage(cluster: dict[str, str], two_drivers: list[str]):
    import mlflow

    client = mlflow.MlflowClient(cluster["MLFLOW_TRACKING_URI"])
    experiment = client.get_experiment_by_name("image-cascade")
    runs = client.search_runs([experiment.experiment_id])
    children = [run for run in runs if "mlflow.parentRunId" in run.data.tags]
    assert {run.info.run_name for run in children} == set(STAGES)
    assert {run.info.status for run in runs} == {"FINISHED"}
    base = next(run for run in children if run.info.run_name == "base" and "loss" in run.data.metrics)
    base = client.get_run(base.info.run_id)
    assert len(client.get_metric_history(base.info.run_id, "loss")) >= 5
    assert base.inputs.dataset_inputs
    assert base.outputs.model_outputs
    composed = [client.get_run(run.info.run_id) for run in children if run.info.run_name == "cascade"]
    assert max(len(run.inputs.model_inputs) for run in composed) == len(MODELS)


def test_every_model_is_registered_and_the_run_is_champion(cluster: dict[str, str], two_drivers: list[str]):
    import mlflow

    client = mlflow.MlflowClient(cluster["MLFLOW_TRACKING_URI"])
    for name in ("image-cascade-smoke", *(f"image-cascade-smoke-{model}" for model in MODELS)):
        version = client.get_model_version_by_alias(name, "champion")
        assert version.version == "1"
        assert version.tags["cascade.stage_key"]


def test_the_registered_cascade_samples_by_both_generators_elsewhere(cluster: dict[str, str], two_drivers: list[str]):
    program = (
        "import json, mlflow, sys; model = mlflow.pyfunc.load_model('models:/image-cascade-smoke@champion');"
        "rows = [{'label': '1', 'seed': 3, 'generator': generator} for generator in ('diffusion', 'tokens')];"
        "print(json.dumps([list(model.predict(rows)), list(model.predict(rows[:1]))]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=cluster, cwd="/", capture_output=True, text=True, timeout=300, check=True
    )
    import base64

    both, alone = json.loads(done.stdout.splitlines()[-1])
    images = [Image.open(io.BytesIO(base64.b64decode(text))) for text in (*both, *alone)]
    assert [image.size for image in images] == [(32, 32)] * 3
    difference = max(abs(a - b) for a, b in zip(images[0].tobytes(), images[2].tobytes(), strict=True))
    assert difference <= 1
