"""Secrets that stand in the environment are used, and written down nowhere: not in what is printed, stored, tracked or
logged by Ray. Files that a run leaves on this machine are readable by no one else where they hold a token.
"""

import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import mlflow
import pytest
import s3fs

CASCADE = str(Path(sys.executable).with_name("cascade"))
SECRETS = {
    "AWS_ACCESS_KEY_ID": "AKIAPLANTEDKEYNUMBER",
    "AWS_SECRET_ACCESS_KEY": "planted/secret+access/key0123456789abcdef",
    "MLFLOW_TRACKING_USERNAME": "planted-user-name",
    "MLFLOW_TRACKING_PASSWORD": "planted-tracking-password",
    "RAY_AUTH_TOKEN": "5ec7e7" * 10 + "beef",
    "HF_TOKEN": "hf_plantedplantedplanted",
}
IN_ADDRESS = "planted-password-in-address"


class Run(NamedTuple):
    printed: str
    folder: Path  # where it was started
    ray: Path  # Ray's own logs
    files: dict[str, bytes]  # of the bucket
    tracked: dict[str, bytes]  # of MLflow


@pytest.fixture(scope="module")
def ran(s3_server: str, mlflow_server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Two stages of the smoke recipe, a training among them, with secrets planted all around."""
    folder, logs = tmp_path_factory.mktemp("secrets"), Path(tempfile.mkdtemp(prefix="r", dir="/tmp"))  # a short path
    keys = {"key": SECRETS["AWS_ACCESS_KEY_ID"], "secret": SECRETS["AWS_SECRET_ACCESS_KEY"]}
    store = s3fs.S3FileSystem(endpoint_url=s3_server, skip_instance_cache=True, use_listings_cache=False, **keys)
    store.mkdir("secrets")
    settings = {**os.environ, **SECRETS, "AWS_ENDPOINT_URL": s3_server, "RAY_TMPDIR": str(logs)}
    address = mlflow_server.replace("//", f"//planted-user-name:{IN_ADDRESS}@")
    command = [CASCADE, "run", "--recipe", "smoke", "--until", "tokenizer", "--storage", "s3://secrets/runs"]
    command += ["--tracking", address, "--set", "images.limit=200", "--set", "tokenizer.total_steps=20"]
    done = subprocess.run(command, cwd=folder, env=settings, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    files = {name: store.cat_file(name) for name in store.find("secrets")}
    yield Run(done.stdout + done.stderr, folder, logs, files, tracked(mlflow_server, folder / "downloaded"))
    shutil.rmtree(logs)


def tracked(address: str, folder: Path) -> dict[str, bytes]:
    """All that MLflow says about the runs, and their artifacts."""
    client = mlflow.MlflowClient(address)
    found = {}
    for run in client.search_runs([one.experiment_id for one in client.search_experiments()]):
        whole = client.get_run(run.info.run_id)
        found[run.info.run_id] = repr((whole.to_dictionary(), whole.inputs, whole.outputs)).encode()
        for entry in client.list_artifacts(run.info.run_id):
            local = Path(client.download_artifacts(run.info.run_id, entry.path, str(folder)))
            found |= read_folder(local if local.is_dir() else local.parent)
    return found


def read_folder(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file() and not path.is_symlink()}


def is_private(path: Path, root: Path) -> bool:
    """Whether the file, or a folder on the way to it, is its owner's alone."""
    return any(not place.stat().st_mode & 0o077 for place in (path, *path.parents) if place.is_relative_to(root))


def leaks(files: dict[str, bytes]) -> list[str]:
    hidden = {**SECRETS, "the address": IN_ADDRESS}
    return [
        f"{kind} in {name}"
        for name, data in files.items()
        for kind, secret in hidden.items()
        if secret.encode() in data
    ]


def test_the_run_left_something_to_look_at(ran: Run) -> None:
    assert any(name.endswith("manifest.json") for name in ran.files)
    assert any(name.endswith("report.html") for name in ran.files)
    assert len(ran.tracked) > 3
    assert any(Path(name).suffix == ".log" for name in read_folder(ran.ray))


def test_nothing_that_is_printed_holds_a_secret(ran: Run) -> None:
    assert leaks({"output": ran.printed.encode()}) == []


def test_no_manifest_report_or_other_stored_file_holds_a_secret(ran: Run) -> None:
    assert leaks(ran.files) == []


def test_nothing_in_mlflow_holds_a_secret(ran: Run) -> None:
    assert leaks(ran.tracked) == []


def test_no_log_and_no_local_file_holds_a_secret(ran: Run) -> None:
    assert leaks(read_folder(ran.ray)) == []
    readable = {name: data for name, data in read_folder(ran.folder).items() if not is_private(Path(name), ran.folder)}
    assert leaks(readable) == []


def test_a_token_is_readable_by_its_owner_alone(ran: Run) -> None:
    token = Path.home() / ".ray" / "auth_token"
    assert not token.exists() or stat.S_IMODE(token.stat().st_mode) == 0o600
