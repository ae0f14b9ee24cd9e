"""The registered cascade behind `mlflow models serve`, over HTTP, without the checkout."""

import base64
import io
import json
import os
import shutil
import signal
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from components.sampling.cascade import Cascade
from components.sampling.requests import Request
from tests.bare_environment import bare_python
from tests.conftest import free_port, wait_for
from tests.served_models import track_cascade
from tests.tiny_cascade import write_cascade


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cascade(tmp_path_factory.mktemp("serve"))


@pytest.fixture(scope="module")
def served(folder: Path, empty_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of the champion's invocations."""
    home, port = tmp_path_factory.mktemp("registry"), free_port()
    tracking_uri = f"sqlite:///{shutil.copy(empty_database, home)}"
    track_cascade(tracking_uri, home, folder, "k1")
    python = str(bare_python(home / "environment"))
    command = [python, "-m", "mlflow", "models", "serve", "--model-uri", "models:/image-cascade-tiny@champion"]
    command += ["--env-manager", "local", "--host", "127.0.0.1", "--port", str(port)]
    path = f"{Path(python).parent}{os.pathsep}{os.environ['PATH']}"  # MLflow starts uvicorn by its name
    variables = {"MLFLOW_TRACKING_URI": tracking_uri, "MLFLOW_DISABLE_TELEMETRY": "true", "PATH": path}
    variables["MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT"] = "300"  # seconds; other tests have the cores too
    process = subprocess.Popen(command, cwd=home, env=os.environ | variables, start_new_session=True)
    wait_for(f"http://127.0.0.1:{port}/health", process)
    yield f"http://127.0.0.1:{port}/invocations"
    os.killpg(process.pid, signal.SIGTERM)  # uvicorn is a child of MLflow's
    process.wait(30)


def post(url: str, body: dict) -> dict:
    data, headers = json.dumps(body).encode(), {"Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=120) as answer:
        return json.load(answer)


def test_the_served_cascade_paints_what_the_local_one_paints(served: str, folder: Path):
    rows = [
        {"label": "food", "seed": 5, "guidance_scale": 2.0, "steps": 6},
        {"label": 1, "seed": 5, "generator": "tokens"},
        {"prompt": "red apple", "seed": 9},
    ]
    answers = post(served, {"inputs": rows})["predictions"]
    theirs = [np.asarray(Image.open(io.BytesIO(base64.b64decode(text)))) for text in answers]
    ours = Cascade.load(folder).sample(
        [
            Request(label="food", seed=5, guidance_scale=2.0, steps=6),
            Request(label="food", seed=5, generator="tokens"),
            Request(prompt="red apple", seed=9),
        ]
    )
    assert max(np.abs(a.astype(int) - b).max() for a, b in zip(ours, theirs, strict=True)) <= 1


def test_a_row_that_cannot_be_met_is_told_why(served: str):
    with pytest.raises(urllib.error.HTTPError) as caught:
        post(served, {"inputs": [{"label": "cars"}]})
    assert caught.value.code == 400
    assert "unknown label 'cars': the classes are 0 animals" in caught.value.read().decode()
