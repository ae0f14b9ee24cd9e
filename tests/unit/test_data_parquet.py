"""Laws of Parquet files as a source: every training row once, whatever the address; what does not fit in one line."""

import json
import logging
import shutil
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from components.data.ingest import open_source
from components.data.listing import SourceError
from components.data.parts import cut_tasks, part_name
from components.data.source_check import check_file, check_source, detect_source, file_to_try, source_digest
from components.data.sources.parquet import list_parquet
from components.data.sources.source import Columns, Item, Source
from components.runtime.storage.connection import StoreError
from components.runtime.storage.store import Store
from tests.hub_server import Hub, hub
from tests.image_sets import CAPTIONS, CLASSES, image, number_of, png, write_parquet

REPO = "someone/pets"
HUB_SET = f"hf://datasets/{REPO}"


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    """A repository of the hub: two files to train on, one to test, a card."""
    write_parquet(tmp_path / "pets/data/train-00000-of-00002.parquet", range(55))
    write_parquet(tmp_path / "pets/data/train-00001-of-00002.parquet", range(55, 120))
    write_parquet(tmp_path / "pets/data/test-00000-of-00001.parquet", range(500, 520))
    (tmp_path / "pets/README.md").write_text("# Pets")
    return tmp_path / "pets"


@pytest.fixture
def pets_hub(pets: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with hub(pets, REPO) as served:
        monkeypatch.setitem(fsspec.config.conf, "hf", {"endpoint": served.endpoint})
        yield served


def write_table(path: Path, **columns: pa.Array | list) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def refusal(action: Callable[[], object], said: str) -> str:
    """The one line of the refusal."""
    with pytest.raises(SourceError, match=said) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def drawn(source: Source, item: Item) -> int:
    """The number that an item's image tells."""
    pixels = source.reader.draw(item, source.reader.read(item), resolution=8).image
    return int(number_of(np.asarray(pixels)))


def test_each_training_row_is_read_once_with_its_class_and_caption_and_a_glob_reads_what_it_names(pets: Path) -> None:
    source = open_source("parquet", str(pets))
    assert source.classes == CLASSES
    numbers = [drawn(source, item) for item in source.items]
    assert sorted(numbers) == list(range(120)), "and none of the test file's"
    assert [item.label for item in source.items] == [number % 3 for number in numbers]
    assert [item.caption for item in source.items] == [f"{CAPTIONS[number % 3]} {number}" for number in numbers]
    assert len({item.key.lower() for item in source.items}) == 120
    assert not any("." in item.key for item in source.items)
    source = open_source("parquet", f"{pets}/data/test-*.parquet")
    assert sorted(drawn(source, item) for item in source.items) == list(range(500, 520))
    assert len(open_source("parquet", f"{pets}/data/*.parquet").items) == 140
    assert len(open_source("parquet", f"{pets}/data/test-00000-of-00001.parquet").items) == 20


def test_keys_and_digest_are_of_what_lies_there_never_of_the_address(pets: Path, tmp_path: Path) -> None:
    shutil.copytree(pets, tmp_path / "moved")  # keeps modification times
    addresses = [str(pets), f"{pets}/data", f"{pets}/data/train-*.parquet", str(tmp_path / "moved")]
    assert len({source_digest("parquet", address) for address in addresses}) == 1
    assert len({open_source("parquet", address).items for address in addresses}) == 1
    before = source_digest("parquet", str(pets))
    write_parquet(pets / "data/test-00000-of-00001.parquet", range(9))
    assert source_digest("parquet", str(pets)) == before, "of what is read alone"
    write_parquet(pets / "data/train-00000-of-00002.parquet", range(9))
    assert source_digest("parquet", str(pets)) != before


def test_a_uri_with_parquet_is_told_from_a_folder_of_images(pets: Path, tmp_path: Path) -> None:
    assert detect_source(str(pets)) == ("parquet", str(pets))
    assert detect_source(f"{pets}/data/train-*.parquet").source == "parquet"
    for number in range(40):
        (tmp_path / "images/cat").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"images/cat/{number}.png").write_bytes(png(image(number, resolution=30)))
    write_table(tmp_path / "images/embeddings.parquet", x=[1])
    assert detect_source(str(tmp_path / "images")).source == "folder"


def test_a_limit_keeps_the_same_rows_when_it_grows(pets: Path) -> None:
    few, more = (open_source("parquet", str(pets), limit=limit).items for limit in (25, 60))
    assert few == more[:25]
    assert len({item.key.rpartition("/")[0] for item in few}) == 2, "of several places of the set"


@pytest.mark.parametrize(("limit", "size"), [(None, 32), (None, 4), (33, 32), (1, 7)])
def test_shards_hold_each_row_once_and_no_row_group_is_read_by_two_tasks(pets: Path, limit: int | None, size: int):
    source = open_source("parquet", str(pets), limit=limit)
    tasks = cut_tasks(source, size)
    shards = [(name, json.loads(items)) for task in tasks for name, items in task.items()]
    assert [name for name, _ in shards] == list(map(part_name, range(len(shards))))
    assert [tuple(item) for _, items in shards for item in items] == list(map(tuple, source.items))
    assert all(0 < len(items) <= size for _, items in shards)
    groups = [{row[3].rpartition(":")[0] for items in task.values() for row in json.loads(items)} for task in tasks]
    assert sum(map(len, groups)) == len(set().union(*groups))


def test_a_row_group_is_fetched_once_and_a_few_rows_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (200, 100, 100, 3), dtype=np.uint8)
    cells = pa.array([{"bytes": png(pixels)} for pixels in noise], pa.struct({"bytes": pa.binary()}))
    (tmp_path / "set").mkdir()
    file = tmp_path / "set/noise.parquet"
    pq.write_table(pa.table({"image": cells, "label": ["a", "b"] * 100}), file, row_group_size=50)
    with hub(tmp_path / "set", REPO) as served:
        monkeypatch.setitem(fsspec.config.conf, "hf", {"endpoint": served.endpoint})
        source = list_parquet(HUB_SET)
        for task in cut_tasks(source, 20):
            for items in task.values():
                for item in json.loads(items):
                    source.reader.read(Item(*item))
    assert file.stat().st_size < sum(served.sent) < 1.3 * file.stat().st_size
    assert max(served.sent) < 5 * 2**20


def test_any_store_gives_the_same_rows(pets: Path, s3_bucket: str, pets_hub: Hub) -> None:
    for file in pets.rglob("*.parquet"):
        Store(f"{s3_bucket}/pets").upload(file, str(file.relative_to(pets)))
    local = open_source("parquet", str(pets))
    for address in (f"{s3_bucket}/pets", HUB_SET):
        assert detect_source(address) == ("parquet", address)
        there = open_source("parquet", address)
        unmarked = [[item._replace(mark="") for item in listing.items] for listing in (there, local)]
        assert unmarked[0] == unmarked[1]
        assert (there.runs, there.classes) == (local.runs, local.classes)
        assert there.reader.read(there.items[7]) == local.reader.read(local.items[7])
        file = file_to_try("parquet", address)
        assert file is not None
        check_file(file)
    assert f"GET /datasets/{REPO}/resolve/main/data/train-00000-of-00002.parquet" in pets_hub.asked


def test_the_digest_of_a_set_of_the_hub_is_of_its_files(pets: Path, pets_hub: Hub, tmp_path: Path) -> None:
    before = source_digest("parquet", HUB_SET)
    copied = shutil.copytree(pets, tmp_path / "copied")
    data = (copied / "data/train-00000-of-00002.parquet").read_bytes()
    (copied / "data/train-00000-of-00002.parquet").write_bytes(bytes([data[0]]) + data[1:4] + b"\0" + data[5:])
    with hub(copied, REPO) as other:
        fsspec.config.conf["hf"] = {"endpoint": other.endpoint}
        assert source_digest("parquet", HUB_SET) != before, "as many bytes, others"


def test_a_set_that_the_hub_has_not_is_one_line(pets_hub: Hub) -> None:
    nowhere = "hf://datasets/nobody/nothing"
    refusal(lambda: detect_source(nowhere), f"{nowhere} can't be listed .*repository not found")
    refusal(lambda: detect_source(f"{HUB_SET}/none"), f"nothing at {HUB_SET}/none")


def test_without_its_package_an_address_of_the_hub_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = import_module("fsspec.registry")
    missing = {"class": "huggingface_hub.HfFileSystem", "err": "Install huggingface_hub to access HfFileSystem"}
    monkeypatch.setitem(registry.known_implementations, "hf", missing)  # as it is without the package's entry point
    monkeypatch.delitem(registry._registry, "hf", raising=False)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(StoreError, match=r"^hf://datasets/a/b needs the extra hub: pip install \S+$") as raised:
        detect_source("hf://datasets/a/b")
    assert "\n" not in str(raised.value)


def test_bytes_and_names_are_read_without_any_note_of_datasets_and_captions_alone_make_one_class(tmp_path: Path):
    images = [png(image(number)) for number in range(4)]
    write_table(tmp_path / "a.parquet", jpg=images, Category=["dog", "red_cat", "dog", "red_cat"])
    source = list_parquet(str(tmp_path))
    assert source.classes == ("dog", "red_cat")
    assert [item.caption for item in source.items] == ["dog", "red cat", "dog", "red cat"]
    write_table(tmp_path / "a.parquet", pixels=images, number=[10, 9, 10, 2], text=[["x", "y"], [], None, ["z"]])
    source = list_parquet(str(tmp_path), Columns(label="number"))
    assert source.classes == ("2", "9", "10")
    assert [item.caption for item in source.items] == ["x", "", "", "z"]
    assert [drawn(source, item) for item in source.items] == [0, 1, 2, 3]
    write_table(tmp_path / "a.parquet", image=[png(image(0))], prompt=["a square"])
    source = list_parquet(str(tmp_path))
    assert (source.classes, source.items[0].caption) == (("image",), "a square")


def test_a_row_without_bytes_or_class_can_not_be_drawn(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", range(4), labels=[0, None, -1, 3])
    source = list_parquet(str(tmp_path))
    for item in source.items[1:]:
        with pytest.raises(ValueError, match="no class"):
            drawn(source, item)
    write_table(tmp_path / "a.parquet", image=pa.array([None, b""], pa.binary()), label=["a", "b"])
    for item in (source := list_parquet(str(tmp_path))).items:
        with pytest.raises(ValueError, match="no bytes"):
            drawn(source, item)


@pytest.mark.parametrize(
    ("columns", "chosen", "said"),
    [
        ({"image": ["a.png"], "label": ["x"]}, Columns(), r"no column of images.* among image \(string\), label"),
        ({"a": [b"x"], "b": [b"y"], "label": ["x"]}, Columns(), "column holds the images among a .*--image-column"),
        ({"image": [b"x"], "width": [3]}, Columns(), "neither a class nor a caption among image .*--label-column"),
        ({"image": [b"x"], "label": [0.5]}, Columns(), "neither a class nor a caption"),
        ({"image": [b"x"], "species": ["x"]}, Columns(label="specie"), "'specie' is not there, did you mean 'species'"),
        ({"image": [b"x"], "label": ["x"]}, Columns(image="label"), "'label' can't be read as image"),
    ],
)
def test_columns_that_do_not_fit_are_one_line(tmp_path: Path, columns: dict, chosen: Columns, said: str) -> None:
    write_table(tmp_path / "a.parquet", **columns)
    assert "a.parquet" in refusal(lambda: check_source("parquet", str(tmp_path), chosen), said)


def test_columns_and_splits_that_are_not_read_are_named_with_what_they_might_be(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, pets: Path
) -> None:
    more = {"fine_label": ["x"], "lable": ["y"], "width": [3], "text": [["a", "b"]]}
    write_parquet(tmp_path / "other/a.parquet", [0], more=more)
    with caplog.at_level(logging.WARNING):
        check_source("parquet", str(tmp_path / "other"))
        check_source("parquet", str(tmp_path / "other"))
    (said,) = caplog.messages
    assert "image from image, caption from caption, label from label" in said
    assert "not read: fine_label (another label), lable (near label: label?), width, text (another caption)" in said
    with caplog.at_level(logging.WARNING):
        check_source("parquet", str(pets))
    assert "train is read (2 files) and test (1 file) is not: holdout_fraction of train is held out" in caplog.text


def test_rows_that_lie_sorted_by_class_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_parquet(tmp_path / "a.parquet", sorted(range(60), key=lambda number: number % 3))
    with caplog.at_level(logging.WARNING):
        list_parquet(str(tmp_path))
    assert "sorted by class" in caplog.text
    caplog.clear()
    write_parquet(tmp_path / "a.parquet", range(60))
    list_parquet(str(tmp_path))
    assert "sorted" not in caplog.text


def test_a_file_that_is_cut_short_or_none_is_one_line(pets: Path) -> None:
    file = pets / "data/train-00001-of-00002.parquet"
    for damaged in (file.read_bytes()[:-100], b"", b"no parquet at all"):
        file.write_bytes(damaged)
        refusal(lambda: list_parquet(str(pets)), r"train-00001-of-00002\.parquet can't be read as Parquet")


def test_damaged_pages_are_one_line_that_names_file_and_row_group(pets: Path) -> None:
    file = pets / "data/train-00001-of-00002.parquet"
    data = bytearray(file.read_bytes())
    data[4:44] = b"\xff" * 40  # the header of the first page
    file.write_bytes(data)
    source = list_parquet(str(pets))
    first = next(item for item in source.items if item.location == f"{file.name}:0:0")
    refusal(lambda: source.reader.read(first), f"{file.name}, row group 0: can't be read")


def test_files_without_rows_or_whose_columns_or_classes_differ_are_refused(pets: Path, tmp_path: Path) -> None:
    write_parquet(tmp_path / "empty/a.parquet", [])
    refusal(lambda: list_parquet(str(tmp_path / "empty")), "have no rows")
    other = pets / "data/train-00001-of-00002.parquet"
    write_table(other, image=[png(image(0))], label=["x"])
    refusal(lambda: list_parquet(str(pets)), r"train-00001-of-00002.parquet has no column 'caption'")
    write_table(other, image=[png(image(0))], label=["x"], caption=["y"])
    refusal(lambda: list_parquet(str(pets)), "name their classes differently")
