"""Sets of another project's shape through the real command: what it prints and leaves out, and a run to its end."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from components.data.shards import View, load_index
from tests.hub_server import hub
from tests.image_sets import number_of, read_whole_shard, write_parquet
from tests.in_process import Done, in_process
from tests.integration.conftest import FEW, SHOWN, settings
from tests.refusals import assert_refused
from tests.stored_files import flip

CASCADE = str(Path(sys.executable).with_name("cascade"))
REPO = "someone/pets"


class Finished(NamedTuple):
    folder: Path
    command: list[str]
    done: Done


@pytest.fixture(scope="module")
def pets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 rows to train on, of which two can't be read, and some to test."""
    folder = tmp_path_factory.mktemp("hub") / "pets"
    more = {"blip": ["a word"] * 150}
    classes = [number % 3 for number in range(150)]
    classes[3] = -1
    write_parquet(
        folder / "data/train-00000-of-00002.parquet", range(150), rows_per_group=25, labels=classes, more=more
    )
    write_parquet(
        folder / "data/train-00001-of-00002.parquet", range(150, 300), rows_per_group=25, corrupt={200}, more=more
    )
    write_parquet(folder / "data/test-00000-of-00001.parquet", range(300, 330), more={"blip": ["a word"] * 30})
    return folder


def test_a_set_of_the_hub_becomes_shards_and_nothing_but_our_lines_is_printed(pets: Path, tmp_path: Path) -> None:
    address = f"hf://datasets/{REPO}"
    options = ["--out", str(tmp_path / "set"), "--resolution", "8", "--samples-per-shard", "64"]
    command = [CASCADE, "data", "parquet", address, *options]
    with hub(pets, REPO) as served:
        variables = {**os.environ, "HF_ENDPOINT": served.endpoint}
        done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    index = load_index(str(tmp_path / "set"))
    found = [number for entry in index.shards for number in number_of(read_whole_shard(index, entry, View(8)).image)]
    assert sorted(found) == [number for number in range(300) if number not in (3, 200)]
    assert {(entry.key, entry.reason) for shard in index.shards for entry in shard.quarantined} >= {
        ("train-00000-of-00002/000003", "ValueError: the row has no class")
    }
    assert index.quarantined == 2
    lines = [re.sub(r"^\d\d:\d\d:\d\d ", "", line) for line in done.stderr.splitlines()]
    assert len(lines) == 3, done.stderr
    assert lines[0].startswith(f"{address}: train is read (2 files) and test (1 file) is not")
    assert "not read: blip" in lines[1]
    assert lines[2].startswith("2 of 300 images (0.7%) are corrupt")
    bar, *summary = done.stdout.splitlines()
    assert bar.startswith("parquet ")
    assert "300/300" in bar
    assert summary == [
        f"298 images of 3 classes in {len(index.shards)} shards (2 quarantined): {tmp_path}/set/index.json",
        "  100  green",
        "   99  blue",
        "   99  red",
    ]


def test_columns_that_do_not_fit_are_one_line_and_exit_code_2(pets: Path, tmp_path: Path) -> None:
    options = ["--out", str(tmp_path / "set")]
    done = in_process("data", "parquet", str(pets), "--label-column", "lable", *options, cwd=tmp_path)
    assert_refused(done, "column 'lable' is not there, did you mean 'label'?")
    assert not (tmp_path / "set").exists()


@pytest.fixture(scope="module")
def finished(pets: Path, ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A run of all stages, small."""
    command = ["run", "--recipe", "vqgan_transformer_32", "--tracking", "none", *SHOWN]
    command += [setting for part in ("tokenizer", "prior") for setting in settings(part, **FEW)]
    command += settings("images", source=pets, samples_per_shard=64)
    folder = tmp_path_factory.mktemp("finished")
    done = in_process(*command, cwd=folder, on_ray=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return Finished(folder, command, done)


def test_a_parquet_set_goes_to_the_end_of_a_run(finished: Finished) -> None:
    folder, _, done = finished
    lines = done.stderr.splitlines()
    assert [line for line in lines if not re.match(r"\d\d:\d\d:\d\d ", line)] == []
    assert sum("train is read" in line or "not read: blip" in line for line in lines) == 2
    (images,) = folder.glob("runs/stages/images/*/manifest.json")
    metadata = json.loads(images.read_text())["metadata"]
    assert (metadata["source"], metadata["samples"]) == ("parquet", 298)
    assert len(metadata["quarantined"]) == 2
    assert metadata["classes"] == ["red", "green", "blue"]
    assert list(folder.glob("runs/runs/vqgan_transformer_32_on_pets-*/report.html"))


def test_force_mends_what_verify_finds(finished: Finished) -> None:
    """One bit in a file of three stages, and nothing that is told of the files."""
    folder, command, _ = finished
    stages = {name: Path(*folder.glob(f"runs/stages/{name}/*")) for name in ("images", "tokens", "samples")}
    parts = (".tar", ".parquet", ".npz")
    damaged = {name: min(f for f in stage.glob("files/*") if f.suffix in parts) for name, stage in stages.items()}
    whole = {name: file.read_bytes() for name, file in damaged.items()}
    for file in damaged.values():
        flip(file)
    found = in_process("verify", cwd=folder)
    assert found.returncode == 1
    assert all(f"{file} differs" in found.stdout for file in damaged.values()), found.stdout
    only = [option for name in stages for option in ("--only", name)]
    done = in_process(*command, *only, "--force", cwd=folder, on_ray=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert in_process("verify", cwd=folder).returncode == 0
    for name, stage in stages.items():
        (mended,) = stage.glob(f"files-*/{damaged[name].name}")
        assert mended.read_bytes() == whole[name]
