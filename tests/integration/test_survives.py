"""What is met while running: what the run survives, what stops it, and what a user is told."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.image_sets import write_tar
from tests.in_process import Done, in_process
from tests.warm_workers import warm_environment

CASCADE = str(Path(sys.executable).with_name("cascade"))


def run(*arguments: str, cwd: Path) -> Done:
    return in_process("run", "--recipe", "smoke", *arguments, cwd=cwd, on_ray=True)


def images(folder: Path, *, good: int, bad: int) -> Path:
    """A folder of two classes with some files that are no images."""
    generator = np.random.default_rng(0)
    for number in range(good + bad):
        place = folder / ("even" if number % 2 == 0 else "odd") / f"{number:04d}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(place)
        if number >= good:
            place.write_bytes(b"not an image")
    return folder


@pytest.fixture(scope="module")
def shards(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set with an index, made by the command."""
    folder = tmp_path_factory.mktemp("shards")
    source = images(folder / "images", good=300, bad=1)
    command = ["data", "folder", str(source), "--out", str(folder / "set"), "--resolution", "32"]
    done = in_process(*command, cwd=folder, on_ray=True)
    assert done.returncode == 0, done.stderr
    assert "1 quarantined" in done.stdout
    return folder / "set"


def test_a_tar_that_was_cut_short_is_one_line_and_the_others_are_not_lost(ray_cluster: None, tmp_path: Path):
    for number in range(3):
        write_tar(tmp_path / "tars" / f"{number}.tar", range(100 * number, 100 * number + 100), side=16)
    whole = (tmp_path / "tars" / "1.tar").read_bytes()
    (tmp_path / "tars" / "1.tar").write_bytes(whole[: len(whole) // 2])
    command = ["data", "webdataset", "tars/*.tar", "--out", "shards"]
    refused = in_process(*command, cwd=tmp_path, on_ray=True)
    assert refused.returncode == 2
    assert "1.tar" in refused.stderr.splitlines()[-1]
    assert refused.stderr.splitlines()[-1].startswith("error: shard ")
    assert "Traceback" not in refused.stderr
    assert not (tmp_path / "shards" / "index.json").exists()
    (tmp_path / "tars" / "1.tar").write_bytes(whole)
    done = in_process(*command, cwd=tmp_path, on_ray=True)
    assert done.returncode == 0, done.stderr
    assert "300 images of 3 classes in 3 shards (0 quarantined)" in done.stdout


def test_without_mlflow_the_run_ends_well_and_says_what_is_missing_and_how_it_gets_there(tmp_path: Path, shards: Path):
    source = f"images.source={shards}"
    away = run("--until", "images", "--set", source, "--tracking", "http://127.0.0.1:9", cwd=tmp_path)
    assert away.returncode == 3, away.stderr
    assert "warning: MLflow did not take everything" in away.stdout
    kept = next(tmp_path.glob("runs/runs/*/undelivered/*/*.jsonl"))
    assert "not registered: a part of the run" in away.stdout
    where = f"--storage {tmp_path}/runs --tracking http://127.0.0.1:9"
    assert f"cascade register {kept.parents[2].name} {where}" in " ".join(away.stdout.split())


def test_too_many_corrupt_images_stop_the_run_and_name_one(ray_cluster: None, tmp_path: Path):
    source = images(tmp_path / "images", good=90, bad=10)
    done = run("--until", "images", "--set", f"images.source={source}", "--tracking", "none", cwd=tmp_path)
    assert done.returncode == 1
    assert "10 of 100 images (10.0%) are corrupt" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("started_with", "stopped_by"),
    [(signal.SIG_DFL, signal.SIGINT), (signal.SIG_IGN, signal.SIGTERM)],
    ids=["Ctrl-C", "kill, of a run that a shell started with &"],
)
def test_an_interrupt_stops_cleanly_and_says_how_to_go_on(
    tmp_path: Path, started_with: signal.Handlers, stopped_by: signal.Signals
):
    """A shell's `&` makes a program deaf to Ctrl-C, which is meant for the one in front. The suite may be run so, and
    its children would inherit that."""
    command = [CASCADE, "run", "--recipe", "smoke", "--until", "images", "--set", "images.limit=200000"]
    process = subprocess.Popen(
        [*command, "--tracking", "none"],
        cwd=tmp_path,
        env=os.environ | warm_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=partial(signal.signal, signal.SIGINT, started_with),
    )
    assert process.stdout is not None
    for line in process.stdout:
        if "images: running" in line:
            break
    time.sleep(1)
    process.send_signal(stopped_by)
    rest = process.communicate(timeout=90)[0]
    assert process.returncode == 130
    assert "nothing that was finished is lost: the same command goes on" in rest
    assert "Traceback" not in rest
    assert not os.path.exists(tmp_path / "runs" / "stages" / "images" / "manifest.json")
