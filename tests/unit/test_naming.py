"""Laws of names: the packaged recipes keep theirs, one's own images have their own, and no name reaches a key."""

import io
import json
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import mlflow
import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from rich.console import Console
from typer.testing import CliRunner

from components.configuration.usage import UsageError
from components.runtime import events
from components.runtime.storage.store import Store
from components.runtime.tracking import promotion, registry
from components.runtime.tracking.names import DATA, registered_name
from components.runtime.tracking.promotion import take
from components.runtime.tracking.tracker import Tracker
from pipelines.command.cli import app
from pipelines.engine import driver
from pipelines.engine.driver import RunOptions, check_name, prepare
from pipelines.engine.execute import Outcome
from pipelines.engine.naming import cascade_name, data_identity, source_name
from pipelines.engine.run_report import load_plan
from pipelines.recipes.catalog import RECIPES, load_recipe
from pipelines.recipes.shapes import Recipe
from tests.conftest import free_port
from tests.image_sets import image, png
from tests.refusals import one_line
from tests.tiny_cascade import commit_model
from tests.tiny_generators import lone


def recipe(name: str, source: str) -> Recipe:
    return load_recipe(name, [f"images.source={source}"])


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("/home/ada/photos", "photos"),
        ("/home/ada/photos/", "photos"),
        ("~/photos", "photos"),
        ("s3://bucket/imagenet/*.tar", "imagenet"),
        ("s3://bucket/imagenet/train/shard-*.tar", "imagenet"),
        ("hf://datasets/someone/pets", "pets"),
        ("hf://datasets/someone/pets/data/train-*.parquet", "pets"),
        ("~/pets.parquet", "pets"),
        ("s3://bucket/*.tar", "bucket"),
        ("s3://bucket/images", "bucket"),
        ("/images", "images"),
        ("https://example.com/sets/my-cats.tar.gz", "my_cats"),
        ("/", "images"),
        ("/home/ada/Fotos für Müller", "Fotos_fur_Muller"),
        ("/home/ada/Fotos fu\u0308r Mu\u0308ller", "Fotos_fur_Muller"),
        ("/data/写真", "images_9c3250"),
        ("/data/фото 2024", "2024_ae9bcc"),
        ("s3://bucket/写真/*.tar", "images_9c3250"),
    ],
)
def test_a_source_is_called_by_the_last_part_that_tells(source: str, name: str):
    assert source_name(source) == name


def test_two_folders_of_other_alphabets_have_two_names():
    names = {source_name(f"/data/{folder}") for folder in ("写真", "图片", "фото", "фото2", "ภาพ", "images")}
    assert len(names) == 6
    assert all(cascade_name(load_recipe("openmoji", []), name) for name in names)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("s3://bucket/tars", "s3://bucket/tars/*.tar", True),
        ("s3://bucket/tars/", "s3://bucket/tars/shard-00*.tar", True),
        ("/home/ada/photos", "/home/ada/../ada/photos/", True),
        ("/home/ada/photos", "/home/bob/photos", False),
        ("s3://one/photos", "s3://other/photos", False),
        ("openmoji", "scenes", False),
    ],
)
def test_a_set_is_known_by_its_address_however_it_is_written(one: str, other: str, same: bool):
    assert (data_identity(one) == data_identity(other)) == same


@pytest.mark.parametrize("name", RECIPES)
def test_every_packaged_recipe_on_its_own_images_keeps_its_name(name: str):
    assert cascade_name(load_recipe(name, []), None) == RECIPES[name]().name


def test_one_s_own_images_name_the_models_and_recipes_stay_apart():
    names = [cascade_name(recipe(name, "/home/ada/photos"), None) for name in ("openmoji", "palette", "fsq")]
    assert names == ["photos", "palette_on_photos", "fsq_on_photos"]
    assert cascade_name(recipe("openmoji", "/home/ada/photos"), "birds-2") == "birds-2"  # given
    own = recipe("openmoji", "/home/ada/photos").model_copy(update={"name": "birds"})  # by its author
    assert cascade_name(own, None) == "birds"


def test_a_folder_called_like_a_recipe_does_not_take_its_name():
    assert cascade_name(recipe("smoke", "/home/ada/openmoji"), None) == "smoke_on_openmoji"
    for name in ("openmoji", "smoke"):
        assert cascade_name(recipe("openmoji", f"/home/ada/{name}"), None) not in RECIPES


@pytest.mark.parametrize("name", ["", "a/b", "a:b", "a b", "-a", "é", "a'b", "a.b", "a" * 101])
def test_a_name_that_is_none_is_refused(name: str):
    with pytest.raises(UsageError, match="letters, digits, - and _"):
        cascade_name(load_recipe("openmoji", []), name)


def test_the_name_is_that_of_the_run_and_in_no_key(tmp_path: Path):
    photos = tmp_path / "photos"
    for name in ("cat", "dog"):
        (photos / name).mkdir(parents=True)
        (photos / name / "1.png").write_bytes(png(image(1)))
    options = {"recipe": "smoke", "set": [f"images.source={photos}"], "storage": str(tmp_path / "runs")}
    first, second = prepare(RunOptions(**options)), prepare(RunOptions(**options, name="birds"))
    assert first.run.startswith("smoke_on_photos-")
    assert second.run.startswith("birds-")
    assert [entry.key for entry in first.planned] == [entry.key for entry in second.planned]


def test_another_evaluation_is_another_run_and_a_forced_one_too(tmp_path: Path) -> None:
    """The last stage of a recipe may depend on neither samples nor evaluation."""

    def name(*settings: str, **options: bool) -> str:
        chosen = {"storage": str(tmp_path), "tracking": "none", "set": list(settings)}
        return prepare(RunOptions("scenes", **chosen, **options)).run

    names = [
        name(),
        name("evaluation.reference_samples=500"),
        name("samples.seed=9"),
        *(name(force=True) for _ in "ab"),
    ]
    assert len({*names}) == len(names)
    assert name() == names[0]


@pytest.mark.parametrize("name", ["exp/1", "..", "a*"])
def test_a_run_by_a_name_that_is_no_folders_is_refused_before_anything_starts(name: str, tmp_path: Path):
    """Nobody would find its plan, and the report that is drawn after all trainings would say so."""
    with pytest.raises(UsageError, match=r"^--run: .* is no name of a f"):
        prepare(RunOptions("smoke", storage=str(tmp_path), tracking="none", run=name))


def test_no_password_of_mlflow_is_kept_with_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(driver.ray, "cluster_resources", dict)
    for address, kept in (
        ("http://me:secret@mlflow:5000", "http://mlflow:5000"),
        ("postgresql://host/mlflow?user=me&password=secret", "postgresql://host/mlflow?…"),
    ):
        prepared = prepare(RunOptions("smoke", storage=str(tmp_path), tracking=address))
        driver._save(prepared, Outcome(), [], seconds=0.0)
        assert load_plan(prepared.root, prepared.run)["facts"]["tracking"] == kept


def test_no_error_of_a_registry_shows_its_password(monkeypatch: pytest.MonkeyPatch):
    client = mock.Mock(**{"get_model_version.side_effect": MlflowException("no answer")})
    monkeypatch.setattr(mlflow, "set_tracking_uri", mock.Mock())
    for room, ask in ((registry, registry.named_version), (promotion, promotion.promote_by_hand)):
        monkeypatch.setattr(room, "MlflowClient", lambda tracking_uri: client)
        with pytest.raises(ValueError, match=r"models:/tiny/1 .*at http://mlflow: no answer$"):
            ask("models:/tiny/1", tracking_uri="http://me:secret@mlflow")


@pytest.fixture
def sets(tmp_path: Path) -> tuple[Path, Path]:
    """Two sets of images that are called the same."""
    for owner in ("ada", "bob"):
        folder = tmp_path / owner / "photos" / "cat"
        folder.mkdir(parents=True)
        (folder / "1.png").write_bytes(png(image(len(owner) + ord(owner[0]))))
    return tmp_path / "ada" / "photos", tmp_path / "bob" / "photos"


def test_two_sets_of_one_name_are_refused_before_anything_starts(
    sets: tuple[Path, Path], empty_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    ada, bob = sets
    tracking = f"sqlite:///{shutil.copy(empty_database, tmp_path)}"
    client = MlflowClient(tracking)
    for stage in (None, "base"):
        assert take(client, registered_name("smoke_on_photos", stage=stage), {DATA: str(ada)}) is None

    def start(folder: Path, *, name: str | None = None, uri: str = tracking) -> str:
        """What is said of the name: "" where the run goes on."""
        options = RunOptions(
            recipe="smoke", set=[f"images.source={folder}"], storage=str(tmp_path / "runs"), tracking=uri, name=name
        )
        said = io.StringIO()
        check_name(prepare(options), Console(file=said, width=400))
        return said.getvalue()

    assert start(ada) == ""
    with pytest.raises(UsageError) as caught:
        start(bob)
    line = f"image-cascade-smoke_on_photos holds models of {ada}, not of {bob}: choose a name with --name"
    assert str(caught.value).startswith(line)
    client.delete_registered_model(registered_name("smoke_on_photos"))
    with pytest.raises(UsageError, match="image-cascade-smoke_on_photos-base holds models of"):
        start(bob)
    assert start(bob, name="bob") == ""
    assert start(bob, uri=f"sqlite:///{tmp_path}/new.db") == ""
    assert not (tmp_path / "new.db").exists(), "asking makes no tables"
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    assert "MLflow is away" in start(bob, uri=f"http://127.0.0.1:{free_port()}")


def test_a_run_refuses_the_name_before_ray_starts_where_its_options_do_not_choose_one(
    sets: tuple[Path, Path], empty_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(driver, "start_ray", lambda *_, **__: pytest.fail("Ray was started"))
    tracking = f"sqlite:///{shutil.copy(empty_database, tmp_path)}"
    take(MlflowClient(tracking), registered_name("smoke_on_photos"), {DATA: str(sets[0])})
    command = ["run", "--recipe", "smoke", "--set", f"images.source={sets[1]}", "--storage", str(tmp_path / "runs")]
    done = CliRunner().invoke(app, [*command, "--tracking", tracking])
    assert isinstance(done.exception, UsageError)
    assert "choose a name with --name (--name smoke_on_photos takes it over)" in str(done.exception)


def test_only_a_name_that_is_typed_is_taken_over(tmp_path: Path):
    options: dict[str, Any] = {"recipe": "smoke", "tracking": "none", "storage": str(tmp_path)}
    assert "chosen_name" not in prepare(RunOptions(**options)).tags
    typed = prepare(RunOptions(name="mine", **options)).tags
    assert (typed["chosen_name"], typed["name"], typed["recipe"]) == ("true", "mine", "smoke")


def test_the_name_of_a_run_is_of_one_set_of_stages(tmp_path: Path):
    """Its figures in MLflow are of them, and would be taken for another's."""
    storage = Store(str(tmp_path / "runs"))
    options: dict[str, Any] = {"recipe": "smoke", "tracking": "none", "run": "exp"}
    first = prepare(RunOptions(storage=storage.uri, **options))
    stages = [{"name": entry.stage.name, "key": entry.key} for entry in first.planned]
    storage.write("runs/exp/plan.json", json.dumps({"stages": stages}).encode())
    assert prepare(RunOptions(storage=storage.uri, until="base", force=True, **options)).run == "exp"
    with one_line(UsageError, "--run exp: that run has other stages or settings; choose another name"):
        prepare(RunOptions(storage=storage.uri, set=["base.total_steps=81"], **options))
    storage.write("runs/exp/plan.json", b"")
    assert prepare(RunOptions(storage=storage.uri, set=["base.total_steps=81"], **options)).run == "exp"


def test_a_name_that_another_set_took_while_mlflow_was_away_registers_nothing_and_says_so(
    empty_database: Path, tmp_path: Path
):
    tracking = f"sqlite:///{shutil.copy(empty_database, tmp_path)}"
    artifact = commit_model(tmp_path, "cascade", "k1", lone("gan", tmp_path / "gan"))

    def end(run: str, **tags: str) -> tuple[list[str], int]:
        """The warnings, and how many versions there are."""
        tracker = Tracker(tracking, experiment="tiny", spool=tmp_path / "spool", flush_seconds=0.3)
        tracker.emit(events.RunStarted(run, "", {}, {"name": "photos", **tags}))
        tracker.emit(events.StageCached("cascade", artifact.model_copy(update={"key": run})))
        warnings = tracker.close("FINISHED")
        versions = MlflowClient(tracking).search_model_versions("name = 'image-cascade-photos'")
        return warnings, len(versions)

    assert end("k1", data="/ada/photos") == ([], 1)
    (warning,), versions = end("k2", data="/bob/photos")
    assert end("k2", data="/bob/photos", chosen_name="true") == ([], 2), "the same run with the remedy that it was told"
    assert end("k1", data="/ada/photos", chosen_name="true") == ([], 2)
    (warning,), versions = end("k2b", data="/bob/photos")
    assert warning.startswith("not registered: image-cascade-photos holds models of /ada/photos, not of /bob/photos")
    assert versions == 2
    assert end("k3", data="/bob/photos", chosen_name="true") == ([], 3)
    (warning,), _ = end("k4", data="/ada/photos")
    assert "holds models of /bob/photos" in warning, "who takes a name over has it"
