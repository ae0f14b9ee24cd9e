"""One run of the command from the images to the registry, of which several files look at what it left."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import mlflow
import pytest
import s3fs

from components.runtime.tracking.names import environment
from tests.warm_workers import warm_environment

SECRETS = {
    "AWS_ACCESS_KEY_ID": "AKIAPLANTEDKEYNUMBER",
    "AWS_SECRET_ACCESS_KEY": "planted/secret+access/key0123456789abcdef",
    "AZURE_STORAGE_ACCOUNT_KEY": "planted/azure+key/0123456789abcdef==",
    "AZURE_STORAGE_SAS_TOKEN": "sv=2026&sig=plantedsignature",
    "MLFLOW_TRACKING_USERNAME": "planted-user-name",
    "MLFLOW_TRACKING_PASSWORD": "planted-tracking-password",
    "RAY_AUTH_TOKEN": "5ec7e7" * 10 + "beef",
    "HF_TOKEN": "hf_plantedplantedplanted",
}
IN_ADDRESS = "planted-password-in-address"
FEW = {"total_steps": 6, "warmup_steps": 2, "checkpoint_every": 3, "sample_every": 3, "global_batch_size": 8}


def settings(where: str, **numbers: object) -> list[str]:
    return [f"--set={where}.{name}={value}" for name, value in numbers.items()]


SCENES = settings("images", source="scenes", limit=128, samples_per_shard=64, resolution=32)
SHOWN = [
    *settings("samples", measured_samples=8, images_per_class=1, num_prompts=2, images_per_prompt=2),
    *settings("evaluation", feature_network="none"),
]


@pytest.fixture
def short_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow is given up after ten seconds."""
    for name, value in environment(timeout_s=10, retries=0).items():
        monkeypatch.setenv(name, value)


class Run(NamedTuple):
    printed: str
    folder: Path  # where it was started
    ray: Path  # Ray's own logs
    storage: str
    tracking: str
    files: dict[str, bytes]  # of the bucket
    tracked: dict[str, bytes]  # of MLflow


@pytest.fixture(scope="session")
def gan_run(s3_server: str, mlflow_server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """The GAN's recipe with few steps and other images, on S3 and an MLflow server, with secrets planted all around."""
    folder, logs = tmp_path_factory.mktemp("secrets"), Path(tempfile.mkdtemp(prefix="r", dir="/tmp"))  # a short path
    keys = {"key": SECRETS["AWS_ACCESS_KEY_ID"], "secret": SECRETS["AWS_SECRET_ACCESS_KEY"]}
    store = s3fs.S3FileSystem(endpoint_url=s3_server, skip_instance_cache=True, use_listings_cache=False, **keys)
    store.mkdir("secrets")
    variables = {**os.environ, **warm_environment(), **SECRETS, "AWS_ENDPOINT_URL": s3_server, "RAY_TMPDIR": str(logs)}
    address = mlflow_server.replace("//", f"//planted-user-name:{IN_ADDRESS}@")
    command = [str(Path(sys.executable).with_name("cascade")), "run", "--recipe", "gan"]
    command += ["--storage", "s3://secrets/runs", "--tracking", address, *SCENES, *SHOWN]
    command += settings("model", **FEW, channels=8, discriminator_channels=8)
    command += settings("images", source="openmoji", held_out_pairs=0)  # not the recipe's own
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    files = {name: store.cat_file(name) for name in store.find("secrets")}
    found = tracked(mlflow_server, "image-cascade", folder / "downloaded")
    yield Run(done.stdout + done.stderr, folder, logs, "s3://secrets/runs", mlflow_server, files, found)
    shutil.rmtree(logs)


def tracked(address: str, experiment: str, folder: Path) -> dict[str, bytes]:
    """All that MLflow says about the runs of an experiment, and their artifacts."""
    client = mlflow.MlflowClient(address)
    found = {}
    wanted = client.get_experiment_by_name(experiment)
    assert wanted is not None
    for run in client.search_runs([wanted.experiment_id]):
        whole = client.get_run(run.info.run_id)
        found[run.info.run_id] = repr((whole.to_dictionary(), whole.inputs, whole.outputs)).encode()
        for entry in client.list_artifacts(run.info.run_id):
            local = Path(client.download_artifacts(run.info.run_id, entry.path, str(folder)))
            found |= read_folder(local if local.is_dir() else local.parent)
    return found


def read_folder(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file() and not path.is_symlink()}
