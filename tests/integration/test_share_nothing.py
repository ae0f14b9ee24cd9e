"""The whole workflow on machines that share nothing but the network: what one of them needs of another is in object
storage, and a model is in the registry."""

import subprocess
from typing import NamedTuple

import mlflow
import pytest
import s3fs

from tests.integration.conftest import FEW, settings
from tests.nodes import nodes

STAGES = ("images", "tokenizer", "tokens", "prior", "base", "upsampler_32", "cascade", "samples", "evaluation")
MODELS = ("tokenizer", "prior", "base", "upsampler_32")
TRAINED = ("tokenizer", "prior", "base", "upsamplers.0")
SMALL = [
    *settings("images", limit=128, samples_per_shard=32),
    *[setting for part in TRAINED for setting in settings(part, **FEW)],
    *settings("samples", measured_samples=8, images_per_class=1, num_prompts=1, images_per_prompt=1),
    *settings("evaluation", reference_samples=32, held_out_samples=8),
]
LEFT = "tmp/ray/"  # logs of Ray


class Ran(NamedTuple):
    code: int
    printed: str
    stored: list[str]  # in the bucket
    left: dict[str, list[str]]  # node -> files on its disk


@pytest.fixture(scope="module")
def ran(s3_server: str, mlflow_server: str, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """A head and two workers, and a driver on the head."""
    log = tmp_path_factory.mktemp("driver") / "driver.log"
    store = s3fs.S3FileSystem(endpoint_url=s3_server, skip_instance_cache=True, use_listings_cache=False)
    store.mkdir("nodes")
    with nodes(2, CASCADE_STORAGE="s3://nodes/runs", MLFLOW_TRACKING_URI=mlflow_server) as cluster:
        driver = cluster.run("python", "pipelines/full_cascade.py", "--recipe", "smoke", *SMALL, log=log)
        try:
            code = driver.wait(480)
        except subprocess.TimeoutExpired:
            code = -1
        left = {node.name: node.files() for node in (cluster.head, *cluster.workers)}
    return Ran(code, log.read_text(), store.find("nodes/runs"), left)


def test_every_stage_is_done(ran: Ran):
    assert ran.code == 0, ran.printed[-4000:]
    assert "warning" not in ran.printed
    for stage in STAGES:
        assert any(f"/stages/{stage}/" in name and name.endswith("/manifest.json") for name in ran.stored), stage


def test_every_model_is_registered(ran: Ran, mlflow_server: str):
    client = mlflow.MlflowClient(mlflow_server)
    for name in ("image-cascade-smoke", *(f"image-cascade-smoke-{model}" for model in MODELS)):
        assert client.get_model_version_by_alias(name, "champion").version == "1"


def test_nothing_but_logs_is_left_on_a_disk(ran: Ran):
    assert len(ran.left) == 3
    for node, files in ran.left.items():
        assert [name for name in files if not name.startswith(LEFT)] == [], node
