"""Laws of `cascade verify`: silence and 0 for a sound run, 1 and a line for each file that is not as committed."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from components.configuration.usage import UsageError
from components.runtime.storage.artifact import Artifact, commit_artifact, describe
from components.runtime.storage.store import Store
from pipelines.command.upkeep import verify_run
from tests.in_process import in_process
from tests.refusals import assert_refused


@pytest.fixture
def root(any_store: str) -> Store:
    """Storage with a run of two finished stages and one that was skipped."""
    root = Store(any_store)
    for name, kind in (("images", "shards"), ("base", "model")):
        stage = root.join("stages", name, "key")
        files = tuple(describe(f"{name}{n}".encode(), f"attempt-1/{n}.bin") for n in range(3))
        for n in range(3):
            stage.write(f"attempt-1/{n}.bin", f"{name}{n}".encode())
        commit_artifact(stage, Artifact(kind=kind, stage=name, key="key", files=files))
    states = {"images": "cached", "base": "done", "samples": "skipped"}
    stages = [{"name": name, "key": "key", "state": state} for name, state in states.items()]
    root.write("runs/tiny-1/plan.json", json.dumps({"saved": 1.0, "stages": stages}).encode())
    return root


def verify(root: Store, run: str | None = None) -> tuple[int, list[str]]:
    out = io.StringIO()
    code = verify_run(run, storage=root.uri, console=Console(file=out, width=400))
    return code, [line for line in out.getvalue().splitlines() if "://" in line or "/stages/" in line]


def test_a_sound_run_is_sound(root: Store):
    assert verify(root) == (0, [])
    assert verify(root, "tiny-1") == (0, [])


def test_each_bad_file_is_a_line_and_the_exit_code_is_1(root: Store):
    root.write("stages/base/key/attempt-1/1.bin", b"basf1")
    root.write("stages/images/key/attempt-1/0.bin", b"image")
    root.delete("stages/images/key/attempt-1/2.bin")
    code, lines = verify(root)
    assert code == 1
    assert [line.split("/stages/")[1].split()[0] for line in lines] == [
        "images/key/attempt-1/0.bin",
        "images/key/attempt-1/2.bin",
        "base/key/attempt-1/1.bin",
    ]


def test_a_manifest_that_is_gone_or_broken_is_found(root: Store):
    root.delete("stages/base/key/manifest.json")
    root.write("stages/images/key/manifest.json", b'{"kind": "shards"}')
    code, lines = verify(root)
    assert code == 1
    assert len(lines) == 2


def test_one_thing_at_a_time_is_verified_and_no_registry_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for two in (["tiny-1", "--run", "tiny-2"], ["tiny-1", "--model", "models:/tiny/1"]):
        assert_refused(in_process("verify", *two, cwd=tmp_path), "name one thing to verify: RUN, --run or --model")
    lacking = in_process("verify", "--model", "models:/tiny@champion", cwd=tmp_path)
    assert_refused(lacking, "models:/tiny@champion is in a registry, and", "mlflow.db is not there", "--tracking")
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_is_not_there_is_named_with_those_that_are(tmp_path: Path, root: Store):
    with pytest.raises(UsageError, match="there are tiny-1"):
        verify(root, "nonsense")
