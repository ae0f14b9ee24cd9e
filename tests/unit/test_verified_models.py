"""What is registered is what is read: a flipped bit in any file of MLflow's copy is refused before a weight is used."""

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import mlflow
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from components.models.bundle import WEIGHTS
from components.models.file_list import LIST, differences, write_list
from components.runtime.tracking.names import FILES, FILES_DIGEST
from components.runtime.tracking.registry import download_model, download_packed, register_version
from components.sampling.requests import Request
from components.serving.settings import ServedModel
from components.serving.versions import Versions
from pipelines.command.cli import app
from tests.served_models import CHAMPION, NAME, Registry, write_other_cascade
from tests.stored_files import flip
from tests.tiny_cascade import commit_model, write_cascade
from tests.waiting import eventually

MODEL = "artifacts/files/"
RED = Request(prompt="red apple", seed=3, generator="diffusion")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> Registry:
    """Version 1 is the tiny cascade, version 2 another."""
    home = tmp_path_factory.mktemp("registry")
    registry = Registry(home, empty_database)
    registry.register(write_cascade(home / "first"), key="k1")
    registry.register(write_other_cascade(home / "second"), key="k2")
    return registry


@pytest.fixture
def registry(whole: Registry) -> Iterator[Registry]:
    """Whatever a test does to MLflow's copies is undone."""
    whole.promote("1")
    kept = whole.home / "kept"
    shutil.copytree(whole.home / "files", kept)
    yield whole
    shutil.rmtree(whole.home / "files")
    kept.rename(whole.home / "files")


def copy_of(registry: Registry, version: str) -> Path:
    """Where MLflow keeps a version's files."""
    return location(registry, registry.client.get_model_version(NAME, version).source.removeprefix("models:/"))


def location(registry: Registry, model_id: str) -> Path:
    return Path(str(registry.client.get_logged_model(model_id).artifact_location).removeprefix("file://"))


def command(*arguments: str, registry: Registry, out: Path) -> str:
    """Run a command that must be refused as wrong use; its line."""
    done = CliRunner().invoke(app, [*arguments, "--tracking", registry.uri, "--out", str(out)])
    assert done.exception is not None
    assert not out.exists(), "nothing is made by a model that is not what was registered"
    return str(done.exception)


def test_a_flipped_bit_in_any_file_is_named_and_nothing_else_is(registry: Registry, tmp_path: Path):
    place = copy_of(registry, "1")
    files = sorted(path for path in place.rglob("*") if path.is_file() and path.name != "registered_model_meta")
    assert {f"{MODEL}cascade.json", f"{MODEL}base/{WEIGHTS}", "MLmodel", "requirements.txt", LIST} <= {
        path.relative_to(place).as_posix() for path in files
    }
    assert any(path.name == "file_list.py" for path in files), "the packed code is listed too"
    copied = download_packed(CHAMPION, tmp_path, tracking_uri=registry.uri)
    for path in (copied.folder / path.relative_to(place) for path in files):
        sound, name = path.read_bytes(), path.relative_to(copied.folder).as_posix()
        flip(path)
        assert differences(copied.folder, digest=copied.digest, text=copied.files) == [f"{name} is changed"]
        assert differences(copied.folder), "a model read from its folder is compared with the list in it"
        path.write_bytes(sound)
    assert differences(copied.folder, digest=copied.digest, text=copied.files) == []


def test_a_file_that_is_missing_or_was_added_is_named(registry: Registry, tmp_path: Path):
    place = copy_of(registry, "1")
    (place / MODEL / "base" / WEIGHTS).unlink()
    (place / "code" / "extra.py").write_text("")
    (place / LIST).unlink()
    with pytest.raises(ValueError, match="not as it was registered") as caught:
        download_model(CHAMPION, tmp_path, tracking_uri=registry.uri)
    wanted = [f"{LIST} is missing", f"{MODEL}base/{WEIGHTS} is missing", "code/extra.py was added"]
    assert f"registered: {', '.join(wanted)};" in str(caught.value)


def test_a_list_that_was_changed_with_its_file_is_seen_by_what_the_registry_says(registry: Registry, tmp_path: Path):
    place = copy_of(registry, "1")
    flip(place / MODEL / "base" / WEIGHTS)
    (place / LIST).unlink()
    write_list(place)
    assert differences(place) == []
    with pytest.raises(ValueError, match=f"{LIST} is changed, {MODEL}base/{WEIGHTS} is changed"):
        download_model(CHAMPION, tmp_path / "by_list", tracking_uri=registry.uri)
    registry.client.delete_model_version_tag(NAME, "1", FILES)  # as of a cascade whose list is too long for a tag
    with pytest.raises(ValueError, match=f"registered: {LIST} is changed;"):
        download_model(CHAMPION, tmp_path / "by_digest", tracking_uri=registry.uri)


def test_every_command_refuses_it(registry: Registry, tmp_path: Path):
    place, image = copy_of(registry, "1"), tmp_path / "image.png"
    flip(place / MODEL / "base" / WEIGHTS)
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(image)
    folder = str(place / MODEL)
    for model, said in ((CHAMPION, f"models:/{NAME}/1 is not as"), (folder, f"{folder} is not as")):
        for arguments in (
            ("sample", "--prompt", "red apple"),
            ("translate", "--image", str(image), "--prompt", "red apple"),
            ("reconstruct", "--image", str(image)),
            ("ema", "--length", "0.1"),
        ):
            line = command(*arguments, "--model", model, registry=registry, out=tmp_path / "out")
            assert said in line
            assert f"base/{WEIGHTS} is changed" in line
            assert "\n" not in line


def test_verify_names_what_differs_and_what_does_not(registry: Registry):
    place = copy_of(registry, "1")

    def verify(model: str) -> tuple[int, str]:
        done = CliRunner().invoke(app, ["verify", "--model", model, "--tracking", registry.uri])
        return done.exit_code, done.output

    sources = (CHAMPION, f"models:/{NAME}/1", str(place / MODEL), str(registry.home / "stages/cascade/k1"))
    assert {verify(source)[0] for source in sources} == {0}
    flip(place / MODEL / "prior" / WEIGHTS)
    flip(registry.home / "stages/cascade/k1/files/prior" / WEIGHTS)
    for source in sources:
        code, said = verify(source)
        assert code == 1
        assert f"prior/{WEIGHTS}" in said
    flip(registry.home / "stages/cascade/k1/files/prior" / WEIGHTS)
    assert verify(f"models:/{NAME}/2")[0] == 0


def test_the_model_of_the_registry_refuses_before_it_loads_a_weight(registry: Registry):
    place = copy_of(registry, "1")
    flip(place / MODEL / "upsampler_16" / WEIGHTS)
    for address in (CHAMPION, str(place)):
        with pytest.raises(ValueError, match=f"this model is not as it was registered: {MODEL}upsampler_16/{WEIGHTS}"):
            mlflow.pyfunc.load_model(address)


def test_a_service_refuses_the_version_and_goes_on_with_the_one_that_it_has(registry: Registry, caplog):
    watched = Versions(ServedModel(name="tiny", source=CHAMPION), tracking=registry.uri, poll_seconds=0.1)
    flip(copy_of(registry, "2") / MODEL / "base" / WEIGHTS)
    with caplog.at_level(logging.WARNING, "cascade.serving"):
        registry.promote("2")
        assert eventually(lambda: watched.card.refused == "2")
    watched.close()
    assert f"models:/{NAME}/2 is not as it was registered: {MODEL}base/{WEIGHTS} is changed" in caplog.text
    assert watched.card.version == "1"
    assert len(watched.current.cascade.sample([RED])) == 1
    with pytest.raises(ValueError, match="is not as it was registered"):
        Versions(ServedModel(name="tiny", source=CHAMPION), tracking=registry.uri, poll_seconds=0.1)


def test_a_version_that_is_deleted_is_registered_anew_from_sound_files(registry: Registry, tmp_path: Path):
    client, run = registry.client, registry.client.create_run(registry.experiment).info.run_id
    artifact = commit_model(tmp_path, "cascade", "k3", write_cascade(tmp_path / "third"))

    def register(models: str) -> str:
        name = f"image-cascade-{models}"
        made = register_version(client, name, artifact, experiment_id=registry.experiment, run_id=run)
        return made.source.removeprefix("models:/")

    logged = register("again")
    assert register("other") == logged, "what is logged and sound is registered under another name as it is"
    flip(location(registry, logged) / MODEL / "base" / WEIGHTS)
    assert register("again") == logged, "nobody reads again what is registered"
    client.delete_model_version("image-cascade-again", "1")
    assert register("again") != logged
    assert download_model("models:/image-cascade-again/2", tmp_path / "sound", tracking_uri=registry.uri).is_dir()


def test_what_a_forced_try_made_under_the_same_key_is_another_version(registry: Registry, tmp_path: Path) -> None:
    client, run = registry.client, registry.client.create_run(registry.experiment).info.run_id
    tries = [
        commit_model(tmp_path / name, "cascade", "k4", registry.home / name / "cascade") for name in ("first", "second")
    ]
    made = [
        register_version(client, "image-cascade-forced", artifact, experiment_id=registry.experiment, run_id=run)
        for artifact in (*tries, tries[0])
    ]
    assert [str(version.version) for version in made] == ["1", "2", "1"]
    assert made[0].source != made[1].source


def test_a_version_says_what_it_is_made_of(registry: Registry):
    tags = registry.client.get_model_version(NAME, "2").tags
    listed = dict(reversed(line.split("  ")) for line in tags[FILES].splitlines())
    entries = commit_model(registry.home, "cascade", "k2", registry.home / "second" / "cascade").files
    assert {MODEL + entry.path.removeprefix("files/"): entry.sha256 for entry in entries}.items() <= listed.items()
    assert len(tags[FILES_DIGEST]) == 64
    assert tags["cascade.stage_key"] == "k2"
