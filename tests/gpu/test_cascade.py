"""The whole cascade by the command, on a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient
from PIL import Image

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(1800)]


def cascade(*arguments: str, cwd: Path) -> str:
    installed = [str(Path(sys.executable).with_name("cascade")), *arguments]
    done = subprocess.run(installed, cwd=cwd, env=os.environ | {"CI": ""}, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def test_smoke_trains_on_the_gpu_from_images_to_a_report_and_its_cascade_samples(
    tmp_path: Path, gpu: torch.device
) -> None:
    tracking = f"sqlite:///{tmp_path}/mlflow.db"
    cascade("run", "--recipe", "smoke", "--storage", str(tmp_path / "runs"), "--tracking", tracking, cwd=tmp_path)
    assert [*(tmp_path / "runs").rglob("report.html")]
    client = MlflowClient(tracking)
    runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    on_gpu = {run.info.run_name for run in runs if "samples_per_second_per_gpu" in run.data.metrics}
    assert len(on_gpu) >= 4, "tokenizer, prior, base and upsampler"
    asked = ["--model", "models:/image-cascade-smoke@champion", "--label", "0", "--seed", "7", "--out", "made"]
    cascade("sample", *asked, "--tracking", tracking, cwd=tmp_path)
    images = [*(tmp_path / "made").glob("*.png")]
    assert images
    assert all(Image.open(path).size[0] >= 32 for path in images)
