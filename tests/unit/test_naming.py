"""Laws of names: the packaged recipes keep theirs, one's own images have their own, and no name reaches a key."""

from pathlib import Path

import pytest

from pipelines.driver import RunOptions, prepare
from pipelines.naming import cascade_name, source_name
from pipelines.recipes.catalog import RECIPES, Recipe, load_recipe
from pipelines.workflow import UsageError
from tests.image_sets import image, png


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
    ],
)
def test_a_source_is_called_by_the_last_part_that_tells(source: str, name: str):
    assert source_name(source) == name


@pytest.mark.parametrize("name", RECIPES)
def test_every_packaged_recipe_on_its_own_images_keeps_its_name(name: str):
    assert cascade_name(load_recipe(name, []), None) == RECIPES[name]().name


def test_one_s_own_images_name_the_models_and_recipes_stay_apart():
    names = [cascade_name(recipe(name, "/home/ada/photos"), None) for name in ("openmoji", "class_guided", "glide")]
    assert names == ["photos", "class_guided_on_photos", "glide_on_photos"]


def test_a_folder_called_like_a_recipe_does_not_take_its_name():
    assert cascade_name(recipe("smoke", "/home/ada/openmoji"), None) == "smoke_on_openmoji"
    for name in ("openmoji", "smoke"):
        assert cascade_name(recipe("openmoji", f"/home/ada/{name}"), None) not in RECIPES


def test_a_recipe_that_is_named_by_its_author_keeps_that_name(tmp_path: Path):
    mine = recipe("openmoji", "/home/ada/photos").model_copy(update={"name": "birds"})
    assert cascade_name(mine, None) == "birds"


def test_a_given_name_goes_before_all_others():
    assert cascade_name(recipe("openmoji", "/home/ada/photos"), "birds-2") == "birds-2"


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
