"""Laws of the registry, with a real MLflow server and a tiny cascade."""

import base64
import io
import json
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from mlflow.tracking import MlflowClient
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from components.configuration.optimization import StartConfig
from components.models.bundle import WEIGHTS, load_bundle
from components.runtime import events
from components.runtime.storage.artifact import Artifact
from components.runtime.tracking.names import environment
from components.runtime.tracking.registry import download_model, named_version, stored_model
from components.runtime.tracking.tracker import Tracker
from components.sampling.cascade import Cascade, compose
from components.sampling.requests import Request, read_settings
from components.training.results import SNAPSHOTS, join_snapshots
from components.weights.starts import open_start
from pipelines.command.cli import app
from pipelines.command.upkeep import write_average
from tests.refusals import one_line
from tests.tiny_cascade import commit_model, write_cascade, write_models
from tests.tiny_generators import LONE, lone, write
from tests.tiny_training import assert_equal_bits
from tests.unit.test_training_power_ema import model_of

REPORT = "s3://bucket/runs/run/report.html"


@pytest.fixture(autouse=True)
def _short_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment().items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def tracking_uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The cluster's MLflow or the laptop's; the latter where nothing is said."""
    if getattr(request, "param", "sqlite") == "server":
        return request.getfixturevalue("mlflow_server")
    return f"sqlite:///{shutil.copy(request.getfixturevalue('empty_database'), tmp_path)}"


BOTH = pytest.mark.parametrize("tracking_uri", ["server", "sqlite"], indirect=True)


@pytest.fixture
def recipe() -> str:
    return f"tiny{time.time_ns()}"


@pytest.fixture
def track(tracking_uri: str, recipe: str, tmp_path: Path) -> Callable[[str], Tracker]:
    def start(run: str) -> Tracker:
        tracker = Tracker(tracking_uri, experiment=recipe, spool=tmp_path / "spool", flush_seconds=0.3)
        tracker.emit(events.RunStarted(run, "", {}, {"name": recipe, "git_commit": "abc123", "report": REPORT}))
        return tracker

    return start


def aliases(client: MlflowClient, name: str) -> dict[str, str]:
    return {alias: str(version) for alias, version in client.get_registered_model(name).aliases.items()}  # SQLite: int


@BOTH
def test_a_champion_is_made_only_when_a_run_ends_well_and_a_key_is_registered_once(
    track: Callable, recipe: str, tracking_uri: str, tmp_path: Path
):
    client, name = MlflowClient(tracking_uri), f"image-cascade-{recipe}-tokenizer"
    models = write_models(tmp_path / "models")
    first, second = (commit_model(tmp_path, "tokenizer", key, models["tokenizer"]) for key in ("k1", "k2"))

    def run(run: str, artifact: Artifact, *, cached: bool, status: str, promote: str = "better") -> None:
        tracker = track(run)
        if cached:
            tracker.emit(events.StageCached("tokenizer", artifact))
        else:
            tracker.emit(events.StageStarted("tokenizer", artifact.key, {}, {}))
            tracker.emit(events.StageEnded("tokenizer", "FINISHED", artifact))
        assert tracker.close(status, promote=promote) == []

    run("one", first, cached=False, status="FINISHED")
    assert aliases(client, name) == {"candidate": "1", "champion": "1"}
    run("two", second, cached=False, status="FAILED")
    assert aliases(client, name) == {"candidate": "2", "champion": "1"}, "a run that failed crowns nobody"
    run("two", second, cached=True, status="FINISHED")
    assert aliases(client, name) == {"candidate": "2", "champion": "1"}, "nothing was measured of either"
    run("two", second, cached=True, status="FINISHED", promote="always")
    assert aliases(client, name) == {"candidate": "2", "champion": "2"}
    run("three", first, cached=True, status="FINISHED", promote="always")
    assert aliases(client, name) == {"candidate": "1", "champion": "1"}
    versions = client.search_model_versions(f"name = '{name}'")
    assert sorted(version.tags["cascade.stage_key"] for version in versions) == ["k1", "k2"]


@pytest.mark.parametrize("tracking_uri", ["server"], indirect=True)
def test_a_registered_cascade_tells_where_it_comes_from_and_samples_in_a_fresh_process(
    track: Callable, recipe: str, tracking_uri: str, tmp_path: Path
):
    models = write_models(tmp_path / "models")
    base = commit_model(tmp_path, "base", "k1", models["base"])
    folder = write_cascade(tmp_path)
    cascade = commit_model(tmp_path, "cascade", "k2", folder)
    tracker = track("run")
    for stage, artifact, inputs in (("base", base, {}), ("cascade", cascade, {"base": base})):
        tracker.emit(events.StageStarted(stage, artifact.key, {}, inputs))
        tracker.emit(events.StageEnded(stage, "FINISHED", artifact))
    tracker.emit(events.ModelsDescribed("Recipe `tiny`.", "    cascade run --recipe tiny"))
    assert tracker.close("FINISHED") == []
    client, name = MlflowClient(tracking_uri), f"image-cascade-{recipe}"
    version = client.get_model_version_by_alias(name, "champion")
    whole = client.get_run(client.get_run(version.run_id).data.tags["mlflow.parentRunId"])
    assert whole.data.tags["mlflow.note.content"] == f"Report: `{REPORT}`"
    pages = {
        "MLflow run": f"{tracking_uri}/#/experiments/{whole.info.experiment_id}/runs/{whole.info.run_id}",
        "model version": f"{tracking_uri}/#/models/{name}/versions/{version.version}",
    }
    assert tracker.delivery is not None
    assert tracker.delivery.pages(tracker.log.run) == pages
    assert version.description == "Recipe `tiny`.\n\n    cascade run --recipe tiny"
    assert client.get_registered_model(name).description == "Recipe `tiny`."
    assert client.get_model_version_by_alias(f"{name}-base", "champion").description == version.description
    assert version.tags["cascade.git_commit"] == "abc123"
    assert version.tags["cascade.artifact"] == cascade.root
    run = client.get_run(version.run_id)
    assert run.data.tags["cascade.stage"] == "cascade"
    assert [model.model_id for model in run.outputs.model_outputs] == [version.source.removeprefix("models:/")]
    (source,) = run.inputs.model_inputs
    assert client.get_logged_model(source.model_id).tags["cascade.stage_key"] == "k1"
    rows = [{"label": 1, "seed": 5}, {"prompt": "red apple", "seed": 6, "generator": "tokens", "guidance_scale": 2.0}]
    program = f"""
        import json, mlflow
        mlflow.set_tracking_uri("{tracking_uri}")
        model = mlflow.pyfunc.load_model("models:/{name}@champion")
        assert model.metadata.signature is not None and model.input_example
        try:
            refused = model.predict([{{"promt": "red apple"}}])
        except Exception as error:
            refused = str(error)
        print(json.dumps([model.predict(json.loads('{json.dumps(rows)}')), refused]))
    """
    # In an empty folder and isolated, so that the packed code is what runs, not this checkout.
    packed = tmp_path / "elsewhere"
    packed.mkdir()
    command = [sys.executable, "-c", textwrap.dedent(program)]
    out = subprocess.run(command, cwd=packed, check=True, capture_output=True, text=True).stdout
    answers, refused = json.loads(out.splitlines()[-1])
    assert "promt" in refused
    assert "Extra inputs are not permitted" in refused
    images = [Image.open(io.BytesIO(base64.b64decode(text))) for text in answers]
    said = [read_settings(base64.b64decode(text)) for text in answers]
    assert said == [{"model": name, **row} | ({"label": "1"} if "label" in row else {}) for row in rows]
    fetched = download_model(f"models:/{name}@champion", tmp_path / "fetched", tracking_uri=tracking_uri)
    tokens = Request(prompt="red apple", seed=6, generator="tokens", guidance_scale=2.0)
    requests = [Request(label="food", seed=5), tokens]
    for ours, theirs in zip(Cascade.load(fetched).sample(requests), images, strict=True):
        assert np.abs(ours.astype(int) - np.asarray(theirs)).max() <= 1


def test_an_image_of_a_registered_model_is_made_again_by_its_version_when_another_is_champion(
    track: Callable, recipe: str, tracking_uri: str, tmp_path: Path
):
    name = f"image-cascade-{recipe}"

    def register(key: str, folder: Path) -> None:
        tracker, artifact = track(key), commit_model(tmp_path, "cascade", key, folder)
        tracker.emit(events.StageStarted("cascade", key, {}, {}))
        tracker.emit(events.StageEnded("cascade", "FINISHED", artifact))
        assert tracker.close("FINISHED", promote="always") == []
        assert tracker.delivery is not None
        assert tracker.delivery.pages(tracker.log.run) == {}, "a file has no pages"

    def sample(*options: str, out: str) -> Path:
        arguments = ["sample", "--tracking", tracking_uri, "--out", str(tmp_path / out), *options]
        done = CliRunner().invoke(app, arguments, catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return tmp_path / out / "1-gan-0003.png"

    register("k1", lone("gan", tmp_path / "first"))
    asked = ["--label", "1", "--seed", "3", "--count", "1"]
    image = sample("--model", f"models:/{name}@champion", *asked, out="once")
    said = read_settings(image.read_bytes()) or {}
    assert (said["model"], said["version"]) == (name, "1")
    kind, network, settings = LONE["gan"]
    wider = write(tmp_path / "wider", kind, network | {"channels": 8}, settings)
    register("k2", compose(tmp_path / "second", model=wider))
    assert sample("--model", f"models:/{name}@champion", *asked, out="champion").read_bytes() != image.read_bytes()
    assert sample("--like", str(image), out="again").read_bytes() == image.read_bytes()


def test_another_average_of_a_registered_model_is_a_version_of_its_name_once(
    track: Callable, recipe: str, tracking_uri: str, tmp_path: Path
):
    model, name = model_of(tmp_path / "trained"), f"image-cascade-{recipe}-prior"
    tracker = track("run")
    tracker.emit(events.StageStarted("prior", "k1", {}, {}))
    tracker.emit(events.StageEnded("prior", "FINISHED", commit_model(tmp_path, "prior", "k1", model)))
    assert tracker.close("FINISHED") == []
    client = MlflowClient(tracking_uri)
    for again, source in enumerate((f"models:/{name}@champion", f"models:/{name}/1")):
        registered = write_average(source, length=0.15, tracking=tracking_uri, out=tmp_path / str(again))
        assert registered == f"models:/{name}/2"
    assert aliases(client, name) == {"candidate": "2", "champion": "1"}, "no run ended well with it"
    version = client.get_model_version(name, "2")
    assert version.tags["cascade.stage_key"] == "k1-ema-0.15"
    assert version.run_id == client.get_model_version(name, "1").run_id, "it tells by which run it was trained"
    stored = download_model(f"models:/{name}@candidate", tmp_path / "stored", tracking_uri=tracking_uri)
    join_snapshots(model / SNAPSHOTS, 0.15, tmp_path / "expected.safetensors")
    assert_equal_bits(load_bundle(stored).module.state_dict(), load_file(tmp_path / "expected.safetensors"))
    address, artifact = stored_model(f"models:/{name}@candidate", tracking_uri=tracking_uri)
    assert (address, artifact.root) == (f"models:/{name}/2", str(tmp_path / "0")), "a training may begin with it"
    assert open_start(StartConfig(uri=artifact.root)).digest == artifact.entry(WEIGHTS).digest
    registered = write_average(f"models:/{name}/1", length=0.1, tracking=tracking_uri, out=tmp_path / "x")
    assert registered == f"models:/{name}/3"


@BOTH
def test_a_model_that_is_not_there_is_one_clear_line(tracking_uri: str, tmp_path: Path):
    with one_line(ValueError, match="can't get models:/nobody@champion from the registry"):
        download_model("models:/nobody@champion", tmp_path, tracking_uri=tracking_uri)
    with pytest.raises(ValueError, match="can't get models:/nobody@champion from the registry"):
        named_version("models:/nobody@champion", tracking_uri=tracking_uri)
