"""Laws of the sources: what they list, what they refuse in one clear line, and what identifies them."""

import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from components.data.ingest import PACKAGED, open_source
from components.data.listing import SourceError
from components.data.source_check import check_file, check_source, detect_source, file_to_try, source_digest
from components.data.sources import packaged
from components.data.sources.folder import list_folder
from components.data.sources.packaged import OPENMOJI_CLASSES, list_fashion_mnist, list_openmoji
from components.data.sources.scenes import DEPTH_UNIT, SHAPES, list_scenes, render, scene
from components.data.sources.source import Columns, safe_keys
from components.data.sources.webdataset import list_tars, split_glob
from components.runtime.storage.store import Store
from pipelines.engine.naming import source_name
from tests.image_sets import image, png, write_files, write_idx, write_set

LABEL = Columns(label="kind")


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    names = ("cat/1.png", "cat/2.png", "black_dog/1.png")
    return write_files(tmp_path / "pets", {name: png(image(number)) for number, name in enumerate(names)})


def test_openmoji_has_thousands_of_named_images_in_nine_classes_drawn_on_white_at_any_size() -> None:
    source = list_openmoji()
    assert len(source.items) >= 3000
    assert len({item.key for item in source.items}) == len(source.items)
    assert {item.label for item in source.items} == set(range(9))
    assert source.license == "CC BY-SA 4.0"
    assert all(item.caption for item in source.items)
    few, more = (open_source("openmoji", None, limit=limit).items for limit in (50, 120))
    assert few == more[:50]
    assert len({item.label for item in few}) >= 5
    grinning = next(item for item in source.items if item.key == "1F600")
    for resolution in (16, 64, 200):
        pixels = source.reader.draw(grinning, source.reader.read(grinning), resolution=resolution).image
        assert np.shape(pixels) == (resolution, resolution, 3)
        assert (np.asarray(pixels)[0, 0] == 255).all()
        assert np.asarray(pixels)[resolution // 2, resolution // 4, 2] < 150  # a yellow face
    assert (grinning.caption, OPENMOJI_CLASSES[grinning.label]) == ("grinning face", "Smileys & Emotion")


def test_a_scene_is_a_function_of_its_number_and_its_class_and_caption_name_its_shape_and_color() -> None:
    one, other = (list_scenes(20) for _ in range(2))
    assert one.items == other.items
    for item in one.items[:3]:
        first, second = (source.reader.draw(item, b"", resolution=24) for source in (one, other))
        assert np.array_equal(np.asarray(first.image), np.asarray(second.image))
        assert first.members == second.members
    for item in list_scenes(60).items:
        solid = scene(int(item.location))[0]
        assert SHAPES[item.label] == solid.shape
        assert f"{solid.color} {solid.shape}" in item.caption


def test_the_mask_shows_each_solid_in_its_own_color_and_the_depth_of_a_sphere_is_exact() -> None:
    solids = next(s for s in map(scene, range(500)) if [solid.color for solid in s] == ["red", "blue"])
    color, _, mask = render(solids, resolution=48)
    assert set(np.unique(mask)) == {0, 1, 2}
    assert color[mask == 1].mean(0).argmax() == 0
    assert color[mask == 2].mean(0).argmax() == 2
    number = next(n for n in range(200) if len(scene(n)) == 1 and scene(n)[0].shape == "sphere")
    solid, item = scene(number)[0], list_scenes(number + 1).items[number]
    members = list_scenes(1).reader.draw(item, b"", resolution=64).members
    depth = np.asarray(Image.open(io.BytesIO(members["depth.png"]))) / DEPTH_UNIT
    mask = np.asarray(Image.open(io.BytesIO(members["mask.png"])))
    assert abs(depth[mask == 1].min() - (solid.z - solid.size)) < 0.1
    assert (depth[mask == 1] < solid.z).all()


def test_sub_folders_are_classes_and_their_names_captions(pets: Path) -> None:
    source = list_folder(str(pets))
    assert source.classes == ("black_dog", "cat")
    assert {(item.key, item.label, item.caption) for item in source.items} == {
        ("cat/1", 1, "cat"),
        ("cat/2", 1, "cat"),
        ("black_dog/1", 0, "black dog"),
    }


JSONL = '{"file": "a.png", "caption": "a, red", "class": "x"}\n{"file_name": "b.png", "text": "blue"}\n'
CSV = 'file,caption,class\na.png,"a, red",x\nb.png,blue,\n'


@pytest.mark.parametrize(("name", "captions"), [("captions.jsonl", JSONL), ("captions.csv", CSV)])
def test_a_captions_file_at_the_top_decides(tmp_path: Path, name: str, captions: str) -> None:
    write_files(tmp_path, {"a.png": png(image(0)), "b.png": png(image(1)), name: captions})
    source = list_folder(str(tmp_path))
    assert [item.caption for item in source.items] == ["a, red", "blue"]
    assert [source.classes[item.label] for item in source.items] == ["x", "image"]


def test_keys_have_no_dots_and_are_unique_whatever_the_names() -> None:
    names = ["a.b.png", "a_b.png", "ä/ö.png", "x" * 300 + ".png", "x" * 300 + "y.png", "A/1.png", "a/1.jpg", "a/1.png"]
    keys = safe_keys(names)
    assert len({key.lower() for key in keys}) == len(names)
    assert not any("." in key for key in keys)
    assert all(0 < len(key) <= 90 for key in keys)
    assert keys == [safe_keys(names[::-1])[::-1][i] for i in range(len(names))]


def test_idx_files_are_read_plain_and_gzipped(tmp_path: Path) -> None:
    pixels = np.arange(6 * 28 * 28, dtype=np.uint8).reshape(6, 28, 28)
    for compress in (False, True):
        folder = tmp_path / str(compress)
        write_idx(folder, pixels, np.array([0, 1, 2, 3, 4, 9], np.uint8), compress=compress)
        source = list_fashion_mnist(str(folder))
        drawn = source.reader.draw(source.items[5], source.reader.read(source.items[5]), resolution=28)
        assert source.items[5].caption == "ankle boot"
        # Gray as it is stored: three equal values, none of them resampled at the images' own size.
        np.testing.assert_array_equal(np.asarray(drawn.image), np.repeat(pixels[5][..., None], 3, axis=2))


def test_fashion_mnist_is_found_by_name_where_it_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packaged, "INSTALLED", str(tmp_path / "set"))
    for ask in (lambda: detect_source("fashion_mnist"), lambda: check_source("fashion_mnist", None)):
        with pytest.raises(SourceError, match="dataset-fashion-mnist"):
            ask()
    write_idx(tmp_path / "set", np.zeros((2, 28, 28), np.uint8), np.zeros(2, np.uint8), compress=True)
    assert detect_source("fashion_mnist") == ("fashion_mnist", str(tmp_path / "set"))
    assert source_digest("fashion_mnist", None) == source_digest("fashion_mnist", str(tmp_path / "set"))
    assert len(open_source("fashion_mnist", None).items) == 2
    with pytest.raises(SourceError, match="did you mean fashion_mnist"):
        detect_source("fashion_mnst")


@pytest.mark.parametrize(("compress", "said"), [(False, "not a whole IDX file"), (True, "can't be unpacked")])
def test_idx_files_that_are_cut_short_are_refused(tmp_path: Path, compress: bool, said: str) -> None:
    write_idx(tmp_path, np.zeros((6, 28, 28), np.uint8), np.zeros(6, np.uint8), compress=compress)
    images = tmp_path / f"train-images-idx3-ubyte{'.gz' * compress}"
    images.write_bytes(images.read_bytes()[:-1])
    with pytest.raises(SourceError, match=said):
        list_fashion_mnist(str(tmp_path))


def test_tars_come_from_a_folder_a_glob_or_alone_and_globs_are_cut_at_their_first_star(tmp_path: Path) -> None:
    write_set(Store(str(tmp_path)), sizes=(2, 2, 2))
    tars = [f"{tmp_path}/shard-00000{number}.tar" for number in range(3)]
    for place, found in ((str(tmp_path), tars), (f"{tmp_path}/*1.tar", tars[1:2]), (tars[2], tars[2:])):
        assert [version.path for version in list_tars(place)] == found
    assert split_glob("s3://b/set/*/x-*.tar") == ("s3://b/set", "*/x-*.tar")
    assert split_glob("/data/set/*.tar") == ("/data/set", "*.tar")
    assert split_glob("memory://set/") == ("memory://set", None)
    assert split_glob(f"{tmp_path}/shard-00000[01].tar") == (str(tmp_path), "shard-00000[01].tar")


def test_brackets_in_the_name_of_a_folder_are_no_glob(tmp_path: Path, pets: Path) -> None:
    images, tars = tmp_path / "photos [2024]", tmp_path / "tars [0-9]"
    shutil.copytree(pets, images)
    write_set(Store(str(tars)), sizes=(2, 2))
    assert detect_source(str(images)) == ("folder", str(images))
    assert [version.path for version in list_tars(f"{tars}/*1.tar")] == [f"{tars}/shard-000001.tar"]
    assert [version.path for version in list_tars(f"{tars}/shard-000001.tar")] == [f"{tars}/shard-000001.tar"]
    assert source_name(str(images)) == "photos_2024"


def test_what_a_uri_stands_for_is_told_by_what_lies_there(tmp_path: Path, pets: Path) -> None:
    write_set(Store(str(tmp_path / "set")), sizes=(2,))
    shutil.copytree(tmp_path / "set", tmp_path / "tars", ignore=shutil.ignore_patterns("*.json"))
    write_idx(tmp_path / "idx", np.zeros((1, 28, 28), np.uint8), np.zeros(1, np.uint8), compress=True)
    assert detect_source("openmoji") == ("openmoji", None)
    assert detect_source("scenes") == ("scenes", None)
    assert detect_source(str(tmp_path / "set")) == ("shards", str(tmp_path / "set"))
    assert detect_source(str(tmp_path / "tars")).source == "webdataset"
    assert detect_source(f"{tmp_path}/tars/*.tar").source == "webdataset"
    assert detect_source(str(tmp_path / "idx")).source == "fashion_mnist"
    assert detect_source(str(pets)).source == "folder"


@pytest.mark.parametrize("source", ["folder", "webdataset", "fashion_mnist", "photographs", "shards"])
def test_a_missing_or_empty_path_is_one_clear_line_before_anything_starts(tmp_path: Path, source: str) -> None:
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(SourceError) as caught:
            check_source(source, str(path))
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("check", "said"),
    [
        (
            lambda folder: check_source("folder", f"{folder}/new"),
            r"no images .* 1 images are .heic and .*magick mogrify",
        ),
        (lambda folder: check_source("webdataset", folder), "1 of 1 tars are empty, of 0 bytes, such as .*b.tar"),
        (lambda folder: check_source("emoji", None), "openmoji, scenes, folder"),
        (lambda folder: check_source("folder", None), "needs a path"),
        (lambda folder: detect_source("openmojy"), "did you mean openmoji"),
        (lambda folder: check_source("shards", folder), "not an index of shards"),
        (
            lambda folder: check_source("scenes", None, LABEL),
            "^scenes is no table, and column 'kind' for label",
        ),
        (lambda folder: check_source("webdataset", folder, LABEL), "is no table"),
    ],
)
def test_a_source_that_can_t_be_used_says_what_it_needs(tmp_path: Path, check: Callable[[str], object], said: str):
    write_files(tmp_path, {"new/a.heic": "x", "b.tar": "", "index.json": json.dumps({"version": 7})})
    with pytest.raises(SourceError, match=said):
        check(str(tmp_path))


def test_a_missing_bucket_is_one_clear_line(s3_server: str) -> None:
    with pytest.raises(SourceError, match="s3://no-such-bucket/x"):
        check_source("webdataset", "s3://no-such-bucket/x")


def test_of_every_source_with_files_one_is_tried_that_is_read(tmp_path: Path, pets: Path) -> None:
    write_set(Store(str(tmp_path / "set")), sizes=(2, 2))
    shutil.copytree(tmp_path / "set", tmp_path / "tars", ignore=shutil.ignore_patterns("*.json"))
    write_idx(tmp_path / "idx", np.zeros((1, 28, 28), np.uint8), np.zeros(1, np.uint8), compress=True)
    write_files(pets, {"about.txt": "no image", "cat/about.txt": "none either"})
    tried = {
        str(tmp_path / "set"): f"{tmp_path}/set/shard-000000.tar",
        f"{tmp_path}/tars/*1.tar": f"{tmp_path}/tars/shard-000001.tar",
        f"{tmp_path}/tars/shard-000000.tar": f"{tmp_path}/tars/shard-000000.tar",
        str(tmp_path / "idx"): f"{tmp_path}/idx/train-images-idx3-ubyte.gz",
    }
    for uri, path in tried.items():
        file = file_to_try(*detect_source(uri))
        assert file is not None
        assert (file.path, file.bytes) == (path, Path(path).stat().st_size)
        check_file(file)
    file = file_to_try("folder", str(pets))  # whichever folder comes first
    assert file is not None
    assert file.path in [str(path) for path in pets.rglob("*.png")]
    check_file(file)


def test_a_file_that_is_not_here_or_is_another_is_refused_in_one_line(tmp_path: Path, pets: Path) -> None:
    file = file_to_try("folder", str(pets))
    assert file is not None
    Path(file.path).write_bytes(b"another")
    with pytest.raises(SourceError, match=r"1\.png has 7 bytes here and"):
        check_file(file)
    Path(file.path).unlink()
    with pytest.raises(SourceError, match=r"1\.png can't be read .*No such file") as caught:
        check_file(file)
    assert "\n" not in str(caught.value)


def test_a_tar_in_a_bucket_is_tried_too(s3_bucket: str) -> None:
    write_set(Store(f"{s3_bucket}/set"), sizes=(2,))
    file = file_to_try("webdataset", f"{s3_bucket}/set/*.tar")
    assert file is not None
    assert file.path == f"{s3_bucket}/set/shard-000000.tar"
    check_file(file)
    with pytest.raises(SourceError, match="can't be read"):
        check_file(file._replace(path=f"{s3_bucket}/set/none.tar"))


def test_the_digest_is_of_what_lies_there_never_of_the_address(tmp_path: Path, pets: Path) -> None:
    shutil.copytree(pets, tmp_path / "moved")  # keeps modification times
    before = source_digest("folder", str(pets))
    assert source_digest("folder", str(tmp_path / "moved")) == before
    os.utime(pets / "cat/1.png", (1, 1))
    assert source_digest("folder", str(pets)) != before
    for name, sizes in (("one", (4, 3)), ("other", (4, 3)), ("more", (4, 4))):
        write_set(Store(str(tmp_path / name)), sizes=sizes)
    one, other, more = (source_digest("shards", str(tmp_path / name)) for name in ("one", "other", "more"))
    assert one == other != more  # of an index that of its shards


@pytest.mark.parametrize("source", PACKAGED)
def test_a_packaged_source_with_another_version_is_another_source(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = source_digest(source, None)
    assert source_digest(source, None) == before
    assert len({source_digest(each, None) for each in PACKAGED}) == len(PACKAGED)
    monkeypatch.setitem(PACKAGED, source, lambda: "another")
    assert source_digest(source, None) != before
